"""Makes the tiny model that the inference tests run: `python make_test_models.py` writes means.onnx beside it.

uint8 windows [batch, 16, 8] -> logits float32 [batch, 4]; with m the mean of a window's 128 values,
logits = m / 255 * [8, 4, -4, -8] + [0, 1, 2, 3]. So a test can say what must come out.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

here = Path(__file__).parent
slope = np.array([[8, 4, -4, -8]], dtype=np.float32) / 255
offset = np.array([0, 1, 2, 3], dtype=np.float32)
graph = helper.make_graph(
    [
        helper.make_node("Cast", ["windows"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "sides"], ["column"], keepdims=1),
        helper.make_node("Reshape", ["column", "flat"], ["mean"]),
        helper.make_node("MatMul", ["mean", "slope"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["logits"]),
    ],
    "means",
    [helper.make_tensor_value_info("windows", TensorProto.UINT8, ["batch", 16, 8])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
    [
        numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "sides"),
        numpy_helper.from_array(np.array([-1, 1], dtype=np.int64), "flat"),
        numpy_helper.from_array(slope, "slope"),
        numpy_helper.from_array(offset, "offset"),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model)
onnx.save(model, str(here / "means.onnx"))
