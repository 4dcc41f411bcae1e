"""Brings an imported graph from float32 to fp16 or int8.

fp16: the blocks' matrices and activations; the picture, layer norms, softmax and the
rollout stay float32, inputs and outputs keep their types.

int8: the blocks' four matrices W as signed bytes, one scale a column; their inputs x as
unsigned bytes between the least and the greatest value of a TOKEN, computed as it
arrives (dynamic quantisation): x = least + step * byte, so that
x W = step * (byte W) + least * (sums of W's columns). ONNX Runtime's own dynamic quantisation takes one scale for the whole
batch, so that a window's answer would depend on its neighbours in the batch; with one
scale a token it does not.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_graph
from import_profile import ImportFault

PRECISIONS: Final = ("fp32", "fp16", "int8")
# What fp16 computes; everything else, above all layer norms and softmax, whose sums of
# squares and exponentials leave its range, stays float32.
_HALF_OPS: Final = frozenset({
    "Add", "Concat", "Conv", "Div", "Erf", "Expand", "Flatten", "Gather", "Gelu", "Gemm", "Identity", "MatMul",
    "Mul", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
})
_LARGEST_HALF: Final = 65504.0
_LEAST_SCALE: Final = 1e-12


def convert(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph in ``precision``; ``model`` (float32, weights inside) may be used up.

    :raises ImportFault: nothing in the graph can be converted.
    """
    if precision == "fp16":
        return _to_fp16(model)
    if precision == "int8":
        return _to_int8(model)
    return model


def _in_network(node: onnx.NodeProto) -> bool:
    """Not the picture, and of an exported network not the rollout (module ``vit`` itself)."""
    return not node.name.startswith((onnx_graph.PICTURE_PREFIX, "vit/", "/"))


def _to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A value exists as float32 under its own name, as fp16 under ``half/name``, or both;
    whichever a node needs and nobody made yet is cast just before it."""
    graph = model.graph
    if any(i.data_type == TensorProto.FLOAT16 for i in graph.initializer):
        raise ImportFault("The graph holds fp16 weights already: import it with --precision fp32, which leaves them.")
    floats = _float_values(model)
    stored = {i.name: i for i in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    halves: set[str] = set()
    only_half: set[str] = set()
    converted = 0

    def cast(source: str, target: str, to: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], name=f"cast/{target}", to=to))

    def as_half(name: str) -> str:
        if name not in floats:
            return name
        if name not in halves:
            halves.add(name)
            if name in stored:
                values = numpy_helper.to_array(stored[name])
                if values.size and float(np.abs(values).max()) > _LARGEST_HALF:
                    raise ImportFault(f"The weights {name} hold values beyond fp16's range: import in fp32 or int8.")
                graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"half/{name}"))
            else:
                cast(name, f"half/{name}", TensorProto.FLOAT16)
        return f"half/{name}"

    def as_full(name: str) -> str:
        if name in only_half:
            only_half.remove(name)
            cast(f"half/{name}", name, TensorProto.FLOAT)
        return name

    for original in graph.node:
        node = onnx.NodeProto.FromString(original.SerializeToString())
        made = [name for name in node.output if name in floats]
        if not (made and node.op_type in _HALF_OPS and _in_network(node)):
            for name in (*node.input, *onnx_graph.outer_names(node)):
                as_full(name)
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            node.input[i] = as_half(name)
        for i, name in enumerate(node.output):
            if name in floats:
                node.output[i] = f"half/{name}"
                halves.add(name)
                only_half.add(name)
        nodes.append(node)
        converted += 1
    for output in graph.output:
        as_full(output.name)
    if converted == 0:
        raise ImportFault("The graph holds no float32 operators that fp16 could compute.")
    onnx_graph.keep(graph.node, nodes)
    del graph.value_info[:]
    _drop_unused(model)
    return model


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 values: inputs, weights and what nodes make."""
    typed = onnx.shape_inference.infer_shapes(model).graph
    found = {v.name for v in (*typed.value_info, *typed.input, *typed.output)
             if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {i.name for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}


def _drop_unused(model: onnx.ModelProto) -> None:
    graph = model.graph
    used = {name for node in graph.node for name in (*node.input, *onnx_graph.outer_names(node))}
    onnx_graph.keep(graph.initializer, [i for i in graph.initializer if i.name in used])


def _weights_of(node: onnx.NodeProto, stored: dict[str, TensorProto]) -> np.ndarray | None:
    """[inputs, outputs] of a matrix product with constant float32 weights."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2 or node.input[1] not in stored:
        return None
    tensor = stored[node.input[1]]
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    matrix = numpy_helper.to_array(tensor)
    if node.op_type == "MatMul":
        return matrix
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0 or settings.get("transA", 0):
        return None
    return matrix.T if settings.get("transB", 0) else matrix


def _to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    stored = {i.name: i for i in graph.initializer}
    # The head decides; it is small, and stays exact.
    last = {n.output[0] for n in _head(model)}
    nodes: list[onnx.NodeProto] = []
    quantised: set[str] = set()
    converted = 0
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    graph.initializer.extend([
        numpy_helper.from_array(np.array(255.0, np.float32), "int8/largest"),
        numpy_helper.from_array(np.array(_LEAST_SCALE, np.float32), "int8/smallest"),
        numpy_helper.from_array(np.array([-1], np.int64), "int8/axis"),
    ])
    for original in graph.node:
        node = onnx.NodeProto.FromString(original.SerializeToString())
        matrix = _weights_of(node, stored) if _in_network(node) and node.output[0] not in last else None
        if matrix is None or min(matrix.shape) < 32:
            nodes.append(node)
            continue
        source, name = node.input[0], f"int8/{node.output[0]}"
        if source not in quantised:
            nodes += _quantise_rows(source, opset)
            quantised.add(source)
        byte, step, least = (f"int8/{source}/{part}" for part in ("byte", "step", "least"))
        scale = np.maximum(np.abs(matrix).max(axis=0) / 127.0, _LEAST_SCALE).astype(np.float32)
        rounded = np.rint(matrix / scale).astype(np.int8)
        graph.initializer.extend([
            numpy_helper.from_array(rounded, f"{name}/weight"),
            numpy_helper.from_array(scale, f"{name}/column_scale"),
            numpy_helper.from_array((rounded.sum(axis=0, dtype=np.int64) * scale).astype(np.float32),
                                    f"{name}/column_sum"),
        ])
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else None
        product = f"{name}/unbiased" if bias else node.output[0]
        nodes += [
            helper.make_node("MatMulInteger", [byte, f"{name}/weight"], [f"{name}/sum"],
                             name=f"{node.name}/product"),
            helper.make_node("Cast", [f"{name}/sum"], [f"{name}/float"], name=f"{node.name}/float",
                             to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}/float", step], [f"{name}/rows"], name=f"{node.name}/rows"),
            helper.make_node("Mul", [f"{name}/rows", f"{name}/column_scale"], [f"{name}/columns"],
                             name=f"{node.name}/columns"),
            helper.make_node("Mul", [least, f"{name}/column_sum"], [f"{name}/floor"], name=f"{node.name}/floor"),
            helper.make_node("Add", [f"{name}/columns", f"{name}/floor"], [product], name=f"{node.name}/total"),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{node.name}/bias"))
        converted += 1
    if converted == 0:
        raise ImportFault(
            "The graph holds no float32 matrix products with constant weights: int8 would change nothing.")
    onnx_graph.keep(graph.node, nodes)
    _drop_unused(model)
    return model


def _quantise_rows(source: str, opset: int) -> list[onnx.NodeProto]:
    """Last-axis rows of a float tensor as bytes between each row's least and greatest."""
    at = f"int8/{source}"
    # ReduceMax and ReduceMin take their axes as an input since opset 18, as an attribute before.
    axes: tuple[list[str], dict[str, Any]] = (["int8/axis"], {}) if opset >= 18 else ([], {"axes": [-1]})

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [f"{at}/{output}"], name=f"{at}/{output}", **attributes)

    return [
        node("ReduceMax", [source, *axes[0]], "most", keepdims=1, **axes[1]),
        node("ReduceMin", [source, *axes[0]], "least", keepdims=1, **axes[1]),
        node("Sub", [f"{at}/most", f"{at}/least"], "range"),
        node("Max", [f"{at}/range", "int8/smallest"], "positive"),
        node("Div", [f"{at}/positive", "int8/largest"], "step"),
        node("Sub", [source, f"{at}/least"], "above"),
        node("Div", [f"{at}/above", f"{at}/step"], "steps"),
        node("Round", [f"{at}/steps"], "whole"),
        node("Cast", [f"{at}/whole"], "byte", to=TensorProto.UINT8),
    ]


def _head(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The matrix products after the last block: those of module ``vit.head``, or in a
    foreign graph the last one before the logits."""
    ours = [n for n in model.graph.node if n.name.startswith("vit.head")]
    if ours:
        return ours
    made_by = {name: node for node in model.graph.node for name in node.output}
    name = onnx_graph.LOGITS
    while (node := made_by.get(name)) is not None:
        if node.op_type in ("MatMul", "Gemm"):
            return [node]
        name = node.input[0]
    return []
