"""Makes the tiny models that the inference tests run: `python make_test_models.py` writes them beside it.

uint8 windows [batch, 16, 8] -> logits float32 [batch, 4]; with m the mean of a window's 128 values, divided by 255,
logits = m * [8, 4, -4, -8] + [0, 1, 2, 3]. So a test can say what must come out.

means.onnx       that and nothing else, weights inside
full/model.onnx  also embedding [batch, 2] = (cos m, sin m) and outlier [batch] = m
full/explain.onnx  attention [batch, 4, 2]: the mean of each cell of 4x4 values plus one, divided by their sum
full/weights.bin   the weights of both graphs of full/
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

here = Path(__file__).parent
def constant(name: str, values: list[int]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def mean_and_logits() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["windows"], ["cells"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["cells", "scale"], ["values"]),
        helper.make_node("ReduceMean", ["values", "sides"], ["column"], keepdims=1),
        helper.make_node("Reshape", ["column", "flat"], ["mean"]),
        helper.make_node("MatMul", ["mean", "slope"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["logits"]),
    ]


def embedding_and_outlier() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cos", ["mean"], ["cosine"]),
        helper.make_node("Sin", ["mean"], ["sine"]),
        helper.make_node("Concat", ["cosine", "sine"], ["embedding"], axis=1),
        helper.make_node("Reshape", ["mean", "alone"], ["outlier"]),
    ]


def attention() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["windows"], ["cells"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["cells", "scale"], ["values"]),
        helper.make_node("Reshape", ["values", "blocks"], ["blocked"]),
        helper.make_node("ReduceMean", ["blocked", "inside"], ["pooled"], keepdims=0),
        helper.make_node("Add", ["pooled", "one"], ["positive"]),
        helper.make_node("ReduceSum", ["positive", "sides"], ["sum"], keepdims=1),
        helper.make_node("Div", ["positive", "sum"], ["shares"]),
        helper.make_node("Mul", ["shares", "gain"], ["attention"]),
    ]


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])


def build(
    nodes: list[onnx.NodeProto],
    outputs: list[onnx.ValueInfoProto],
    tensors: list[onnx.TensorProto],
) -> onnx.ModelProto:
    windows = helper.make_tensor_value_info("windows", TensorProto.UINT8, ["batch", 16, 8])
    graph = helper.make_graph(nodes, "means", [windows], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def weights() -> dict[str, onnx.TensorProto]:
    values = {
        "scale": np.array(1 / 255, np.float32),
        "slope": np.array([[8, 4, -4, -8]], np.float32),
        "offset": np.array([0, 1, 2, 3], np.float32),
        "gain": np.ones((4, 2), np.float32),
    }
    return {name: numpy_helper.from_array(array, name) for name, array in values.items()}


def outside(tensors: dict[str, onnx.TensorProto]) -> bytes:
    """Moves the tensors' values out of them. Returns the file that they then refer to."""
    content = b""
    for tensor in tensors.values():
        raw = tensor.raw_data
        set_external_data(tensor, "weights.bin", offset=len(content), length=len(raw))
        tensor.ClearField("raw_data")
        content += raw
    return content


sides, flat = constant("sides", [1, 2]), constant("flat", [-1, 1])
inside = weights()
plain = build(mean_and_logits(), [value("logits", 4)],
              [sides, flat, inside["scale"], inside["slope"], inside["offset"]])
onnx.checker.check_model(plain)
onnx.save(plain, str(here / "means.onnx"))

shared = weights()
(here / "full").mkdir(exist_ok=True)
(here / "full" / "weights.bin").write_bytes(outside(shared))
classifier = build(
    mean_and_logits() + embedding_and_outlier(),
    [value("logits", 4), value("embedding", 2), value("outlier")],
    [sides, flat, constant("alone", [-1]), shared["scale"], shared["slope"], shared["offset"]],
)
explainer = build(
    attention(),
    [value("attention", 4, 2)],
    [sides, constant("blocks", [-1, 4, 4, 2, 4]), constant("inside", [2, 4]),
     numpy_helper.from_array(np.float32(1), "one"), shared["scale"], shared["gain"]],
)
for name, model in (("model", classifier), ("explain", explainer)):
    file = here / "full" / f"{name}.onnx"
    file.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(file))
