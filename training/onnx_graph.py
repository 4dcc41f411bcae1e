"""A ready ONNX file brought to a bundle's form, and names that all imported graphs share.

An imported network is exported once with three outputs; `graphs.split` makes the
classifier and the explanation of it, over one weights file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.utils
from onnx import TensorProto, helper, numpy_helper

import graphs
from checkpoint_file import first_line
from import_profile import ImportFault
from picture import Picture

INPUT: Final = "windows"
LOGITS: Final = "logits"
EMBEDDING: Final = "embedding"
ATTENTION: Final = "attention"
OUTPUTS: Final = (LOGITS, EMBEDDING, ATTENTION)
PICTURE_PREFIX: Final = "picture/"
"""Nodes of the picture have names that begin so: precision.py leaves them in float32."""


def outer_names(node: onnx.NodeProto) -> list[str]:
    """Names from outside that a node's inner graphs use."""
    return [name for a in node.attribute if a.type == onnx.AttributeProto.GRAPH
            for inner in a.g.node for name in (*inner.input, *outer_names(inner))]


def keep(field: Any, kept: list[Any]) -> None:
    """Leaves only these messages in a repeated field."""
    copies = [type(k).FromString(k.SerializeToString()) for k in kept]
    del field[:]
    field.extend(copies)


def _dimensions(value: onnx.ValueInfoProto) -> list[int | None]:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _said(value: onnx.ValueInfoProto) -> str:
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    return f"{value.name} {kind} {['free' if d is None else d for d in _dimensions(value)]}"


@dataclass(frozen=True)
class Adopted:
    """A ready graph, brought to the bundle's form: input ``windows`` uint8
    [batch, bands, frames], output ``logits``."""

    model: onnx.ModelProto
    input: str
    """What the file calls its input."""
    output: str
    """And its answer."""
    drawn: bool
    """The picture was put before it: the file's input is pictures."""
    probabilities: bool
    """The file's answer is behind a softmax, which was taken off."""
    left_aside: list[str]


def adopt(path: Path, picture: Picture, bands: int, frames: int, input_name: str | None,
          output_name: str | None) -> Adopted:
    """Reads a ready graph.

    :raises ImportFault: no ONNX, or inputs and outputs that do not fit.
    """
    try:
        model = onnx.load(str(path))
    except FileNotFoundError as cause:
        raise ImportFault(f"A file that {path} keeps its weights in is missing ({cause}).") from None
    except Exception as cause:  # noqa: BLE001 - protobuf, ONNX and NumPy each have their own
        raise ImportFault(f"{path} is truncated, damaged or no ONNX file ({first_line(cause)}).") from None
    if not model.graph.node:
        raise ImportFault(f"{path} is truncated, damaged or no ONNX file (it holds no graph).")
    for i, node in enumerate(model.graph.node):
        node.name = f"graph/{node.op_type}.{i}"
    stored = {i.name for i in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in stored]
    entry = _pick(inputs, input_name, "input", path)
    entry_name = entry.name
    keep(model.graph.input, [entry])
    entry = model.graph.input[0]
    shape, kind = _dimensions(entry), entry.type.tensor_type.elem_type
    size = picture.form.image_size
    if kind == TensorProto.UINT8 and shape[1:] == [bands, frames]:
        behind_picture = False
    elif kind == TensorProto.FLOAT and shape[1:] == [3, size, size]:
        behind_picture = True
    else:
        raise ImportFault(
            f"The input of {path} is {_said(entry)}: it must be uint8 [free, {bands}, {frames}] (windows as the "
            f"profile makes them) or float [free, 3, {size}, {size}] (pictures as the profile draws them)."
        )
    if shape[0] is not None:
        raise ImportFault(
            f"The input of {path} has a fixed batch of {shape[0]}: export it with a free first dimension.")
    answers = list(model.graph.output)
    logits = _pick_logits(answers, output_name, path)
    logits_name = logits.name
    left_aside = [o.name for o in answers if o.name != logits_name]
    last = next((n for n in model.graph.node if logits.name in n.output), None)
    probabilities = last is not None and last.op_type == "Softmax"
    source = last.input[0] if last is not None and probabilities else logits_name
    model.graph.node.append(helper.make_node("Identity", [source], ["acousticsense_logits"], name="logits/Identity"))
    classes = _dimensions(logits)[1]
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("acousticsense_logits", TensorProto.FLOAT, ["batch", classes]))
    if behind_picture:
        _put_behind(model, picture, bands, frames)
    else:
        _rename(model.graph, entry.name, INPUT)
        model.graph.input[0].CopyFrom(
            helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", bands, frames]))
    _rename(model.graph, "acousticsense_logits", LOGITS)
    # Only what the logits need.
    model = onnx.utils.Extractor(model).extract_model([INPUT], [LOGITS])
    graphs.clean(model)
    return Adopted(model, entry_name, logits_name, behind_picture, probabilities, left_aside)


def _pick(values: list[onnx.ValueInfoProto], name: str | None, what: str, path: Path) -> onnx.ValueInfoProto:
    if name is not None:
        found = next((v for v in values if v.name == name), None)
        if found is None:
            raise ImportFault(f"{path} has no {what} named {name}: it has {'; '.join(map(_said, values))}.")
        return found
    if len(values) != 1:
        raise ImportFault(
            f"{path} has {len(values)} {what}s ({'; '.join(map(_said, values))}): name one with --{what}.")
    return values[0]


def _pick_logits(outputs: list[onnx.ValueInfoProto], name: str | None, path: Path) -> onnx.ValueInfoProto:
    if name is None and len(outputs) > 1 and any(o.name == LOGITS for o in outputs):
        name = LOGITS
    found = _pick(outputs, name, "output", path)
    shape = _dimensions(found)
    if len(shape) != 2 or shape[1] is None or found.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ImportFault(f"The output of {path} is {_said(found)}: it must be float [free, classes].")
    return found


def _values(graph: onnx.GraphProto) -> set[str]:
    named = {name for node in graph.node for name in (*node.input, *node.output)}
    return named | {i.name for i in (*graph.initializer, *graph.input)}


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Of a value, in inner graphs too; whatever has the new name already makes room."""
    if old == new:
        return
    if new in _values(graph):
        _rename(graph, new, f"{new}_of_the_graph")
    _rename_free(graph, old, new)


def _rename_free(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                if name == old:
                    field[i] = new
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_free(attribute.g, old, new)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new


def _put_behind(model: onnx.ModelProto, picture: Picture, bands: int, frames: int) -> None:
    """Makes windows the input and the picture, as `Picture` computes it, the first part.
    Built from operators that have not changed since opset 13, so that the graph keeps
    its own."""
    old = "acousticsense_picture"
    _rename(model.graph, model.graph.input[0].name, old)
    if INPUT in _values(model.graph):
        _rename(model.graph, INPUT, f"{INPUT}_of_the_graph")
    constants = {name: getattr(picture, name).numpy() for name in ("table", "rows", "columns", "mean", "std")}
    if picture.grey:
        constants["table"] = np.repeat(constants["table"], 3, axis=1)
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(values, PICTURE_PREFIX + name))

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=f"{PICTURE_PREFIX}{op}.{output}", **attributes)

    p = PICTURE_PREFIX
    nodes = [
        node("Cast", [INPUT], p + "level", to=TensorProto.INT32),
        node("Gather", [p + "table", p + "level"], p + "colour", axis=0),
        node("Transpose", [p + "colour"], p + "channels", perm=[0, 3, 1, 2]),
        node("MatMul", [p + "channels", p + "columns"], p + "wide"),
        node("MatMul", [p + "rows", p + "wide"], p + "levels"),
        node("Sub", [p + "levels", p + "mean"], p + "centred"),
        node("Div", [p + "centred", p + "std"], old),
    ]
    keep(model.graph.node, [*nodes, *model.graph.node])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", bands, frames]))
