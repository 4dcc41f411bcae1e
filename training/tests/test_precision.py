"""fp16 and int8 graphs: near the float32 one, smaller, and blind to their neighbours."""

from __future__ import annotations

import logging
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch

import graphs
import import_checkpoint
import onnx_graph
import precision
import vision_transformer
from import_profile import ImportFault
from picture import CCMUSIC, Picture

CONFIG = vision_transformer.VitConfig(224, 32, 192, 2, 3, 384, True, 1e-6, (192, 64, 16))


class Precisions(unittest.TestCase):
    scratch: ClassVar[tempfile.TemporaryDirectory[str]]

    @classmethod
    def setUpClass(cls) -> None:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        cls.scratch = tempfile.TemporaryDirectory()
        cls.windows = import_checkpoint.synthetic_windows(128, 491, 6)
        torch.manual_seed(2)
        vit = vision_transformer.VisionTransformer(CONFIG).eval()
        for parameter in (vit.cls, vit.position):
            torch.nn.init.normal_(parameter, std=0.02)
        network = vision_transformer.ImportedNetwork(Picture(CCMUSIC, 128, 491), vit).eval()
        exported = graphs.export(network, torch.from_numpy(cls.windows[:2]), onnx_graph.INPUT, onnx_graph.OUTPUTS)
        content = exported.SerializeToString()
        cls.folder, cls.answers = {}, {}
        for kind in precision.PRECISIONS:
            folder = Path(cls.scratch.name) / kind
            folder.mkdir()
            graphs.split(precision.convert(onnx.ModelProto.FromString(content), kind),
                         {"model.onnx": ["logits", "embedding"], "explain.onnx": ["attention"]}, folder)
            cls.folder[kind] = folder
            cls.answers[kind] = [
                *import_checkpoint.run_graph(folder / "model.onnx", cls.windows, ["logits", "embedding"]),
                *import_checkpoint.run_graph(folder / "explain.onnx", cls.windows, ["attention"]),
            ]

    @classmethod
    def tearDownClass(cls) -> None:
        cls.scratch.cleanup()
        logging.disable(logging.NOTSET)

    def test_logits_stay_near_float32_and_are_not_float32(self) -> None:
        exact = self.answers["fp32"][0]
        for kind, share in (("fp16", 0.01), ("int8", 0.15)):
            error = np.abs(self.answers[kind][0] - exact).max() / exact.std()
            self.assertLess(error, share, kind)
            self.assertGreater(error, 1e-5, kind)

    def test_embedding_and_explanation_keep_their_form(self) -> None:
        for kind in precision.PRECISIONS:
            _, embedding, attention = self.answers[kind]
            self.assertEqual(embedding.dtype, np.float32)
            np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-3)
            np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, atol=1e-3)
            self.assertLess(np.abs(attention - self.answers["fp32"][2]).max(), 0.01)

    def test_a_windows_answer_does_not_depend_on_its_batch(self) -> None:
        """ONNX Runtime's own dynamic quantisation fails here: one scale for the batch."""
        loud = np.concatenate([self.windows[:1], np.full_like(self.windows[:1], 255), self.windows[3:]])
        for kind in precision.PRECISIONS:
            alone = import_checkpoint.run_graph(self.folder[kind] / "model.onnx", self.windows[:1], ["logits"])[0]
            among = import_checkpoint.run_graph(self.folder[kind] / "model.onnx", loud, ["logits"])[0]
            np.testing.assert_allclose(among[0], alone[0], atol=1e-4, err_msg=kind)

    def test_both_graphs_refer_to_one_smaller_weights_file(self) -> None:
        sizes = {k: (f / "weights.bin").stat().st_size for k, f in self.folder.items()}
        self.assertLess(sizes["fp16"], 0.75 * sizes["fp32"])
        self.assertLess(sizes["int8"], 0.75 * sizes["fp32"])
        for folder in self.folder.values():
            for name in ("model.onnx", "explain.onnx"):
                self.assertLess((folder / name).stat().st_size, 200_000)
                self.assertEqual(onnx.load(str(folder / name), load_external_data=False).graph.input[0].name, "windows")

    def test_int8_multiplies_the_blocks_matrices_as_bytes_and_leaves_the_head(self) -> None:
        nodes = onnx.load(str(self.folder["int8"] / "model.onnx"), load_external_data=False).graph.node
        self.assertEqual(sum(n.op_type == "MatMulInteger" for n in nodes), 4 * CONFIG.depth)
        self.assertEqual(sum(n.name.startswith("vit.head") and n.op_type in ("MatMul", "Gemm") for n in nodes), 2)

    def test_foreign_graphs_of_older_opsets_are_converted_too(self) -> None:
        draw = np.random.default_rng(1)
        node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        weights = [onnx.numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name)
                   for name, shape in (("a", (64, 96)), ("b", (96, 5)))]
        content = onnx.helper.make_model(onnx.helper.make_graph(
            [node("Cast", ["windows"], ["x"], name="graph/Cast", to=1),
             node("MatMul", ["x", "a"], ["h"], name="graph/m"),
             node("Relu", ["h"], ["r"], name="graph/r"), node("MatMul", ["r", "b"], ["logits"], name="graph/l")],
            "g", [value("windows", 2, ["n", 64])], [value("logits", 1, ["n", 5])], weights),
            opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
        windows = draw.integers(0, 256, (7, 64)).astype(np.uint8)
        answers = {}
        for kind in precision.PRECISIONS:
            folder = Path(self.scratch.name) / f"old-{kind}"
            folder.mkdir()
            converted = precision.convert(onnx.ModelProto.FromString(content), kind)
            if kind == "int8":
                self.assertEqual([n.op_type for n in converted.graph.node].count("MatMulInteger"), 1)
            graphs.split(converted, {"model.onnx": ["logits"]}, folder)
            answers[kind] = import_checkpoint.run_graph(folder / "model.onnx", windows, ["logits"])[0]
        for kind in ("fp16", "int8"):
            error = np.abs(answers[kind] - answers["fp32"]).max() / answers["fp32"].std()
            self.assertLess(error, 0.05, kind)
            self.assertGreater(error, 1e-6, kind)

    def test_weights_beyond_fp16_are_refused(self) -> None:
        node = onnx.helper.make_node("MatMul", ["windows", "w"], ["logits"], name="graph/MatMul")
        weights = onnx.numpy_helper.from_array(np.full((2, 2), 1e5, np.float32), "w")
        value = onnx.helper.make_tensor_value_info
        model = onnx.helper.make_model(onnx.helper.make_graph(
            [node], "g", [value("windows", 1, ["n", 2])], [value("logits", 1, ["n", 2])], [weights]))
        with self.assertRaisesRegex(ImportFault, "beyond fp16"):
            precision.convert(model, "fp16")


if __name__ == "__main__":
    unittest.main()
