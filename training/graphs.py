"""ONNX graphs of a bundle: one exported graph becomes several files over one weights file.

The classifier and the explain graph are the same network read at other outputs. Each
gets the part of the graph that its outputs need; the weights lie once, in a file that
both refer to by offset, so that whoever opens the second graph does not hold them twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Mapping, Sequence

import onnx
import torch
from onnx import external_data_helper
from torch import Tensor, nn

OPSET: Final = 18
IR_VERSION: Final = 10
"""Readers older than the writing library accept this version."""

_SMALLEST: Final = 1024
"""Bytes under which a constant stays in the graph."""

_ALIGNMENT: Final = 4096
"""Offsets are multiples of a page, so that a runtime can map the file."""


def export(
    model: nn.Module, example: Tensor, input_name: str, outputs: Sequence[str]
) -> onnx.ModelProto:
    """The network's graph with its weights inside; the first axis of the input is free."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (example,), input_names=[input_name], output_names=list(outputs),
            dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True,
            external_data=False, verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _name_by_module(graph)
    clean(graph)
    return graph


def _name_by_module(model: onnx.ModelProto) -> None:
    """Names each node after the module it comes from (``vit.blocks.3.qkv/MatMul.41``):
    precision.py chooses by it, and profilers show it."""
    for i, node in enumerate(model.graph.node):
        scopes = next((p.value for p in node.metadata_props if p.key.endswith("name_scopes")), "")
        inner = [part for part in scopes.strip("[]").replace("'", "").split(", ") if part]
        node.name = f"{inner[-2] if len(inner) > 1 else ''}/{node.op_type}.{i}"


def clean(model: onnx.ModelProto) -> None:
    """Removes paths and source lines of the exporting machine: of no use to a reader."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:]
    del model.metadata_props[:]
    graph.doc_string = ""
    model.ir_version = min(model.ir_version, IR_VERSION)


def split(
    model: onnx.ModelProto, parts: Mapping[str, Sequence[str]], directory: Path,
    weights: str = "weights.bin",
) -> None:
    """Writes a file per part, each with what its outputs need, and ``weights``.

    ``parts``: file name -> output names, e.g. ``{"model.onnx": ["logits", "embedding"],
    "explain.onnx": ["attention"]}``. ``model`` holds its weights inside.
    """
    places: dict[str, tuple[int, int]] = {}
    with (directory / weights).open("wb") as file:
        for tensor in model.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) < _SMALLEST:
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            places[tensor.name] = (file.tell(), len(data))
            file.write(data)
    inputs = [value.name for value in model.graph.input]
    for name, outputs in parts.items():
        part = onnx.utils.Extractor(model).extract_model(inputs, list(outputs))
        part.ir_version = model.ir_version
        for tensor in part.graph.initializer:
            if tensor.name not in places:
                continue
            offset, length = places[tensor.name]
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            for field in ("float_data", "int32_data", "int64_data", "double_data"):
                tensor.ClearField(field)
            tensor.raw_data = raw
            external_data_helper.set_external_data(tensor, weights, offset=offset, length=length)
            tensor.ClearField("raw_data")
        onnx.save(part, str(directory / name))
        onnx.checker.check_model(str(directory / name))
