"""Checkpoints brought in: recognised, compared, written, and refused in a sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import unittest
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import checkpoint_file
import import_checkpoint
import import_profile
import parity_checkpoint
import parity_report
import own_audio
import vision_transformer
import vit_checkpoint
from import_profile import ImportFault
from picture import CCMUSIC, Picture, PictureForm

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH, DEPTH, HEADS, MLP, PATCH = 192, 2, 3, 96, 32
PIXELS = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(5))


def torchvision_vit(classes: int = 16, seed_head: bool = False) -> nn.Module:
    """A small ViT of torchvision's own class, its head woken up (torchvision starts it at 0)."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(3)
    network = VisionTransformer(224, PATCH, DEPTH, HEADS, WIDTH, MLP, num_classes=classes)
    if seed_head:
        network.heads = nn.Sequential()
        sizes = (WIDTH, *parity_checkpoint.SIZES[1:-1], classes)
        network.heads.add_module("head", parity_checkpoint.seed_head(sizes))
    else:
        nn.init.normal_(network.heads.head.weight, std=0.3)
    return network.eval()


def run_import(*args: str) -> tuple[int, str, str]:
    """-> exit code, stdout, stderr of the program, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = import_checkpoint.main(list(args))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def load_with_node(bundle: Path) -> str:
    """The bundle's digest by the service's own loader, or the sentence it refuses it with."""
    source = (f"import {{ loadBundle }} from {json.dumps(str(ROOT / 'packages/shared/src/bundle.ts'))};"
              f"try {{ console.log((await loadBundle({json.dumps(str(bundle))})).digest) }}"
              "catch (error) { console.log(error.message) }")
    done = subprocess.run([own_audio.find_node(), "--input-type=module", "-e", source],
                          capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


class Folder(unittest.TestCase):
    """A scratch folder for each test."""

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)


class AnImportedBundle(unittest.TestCase):
    """One checkpoint with the seed's head, imported once for all of these."""

    scratch: ClassVar[tempfile.TemporaryDirectory[str]]
    bundle: ClassVar[Path]
    report: ClassVar[dict[str, Any]]
    network: ClassVar[nn.Module]

    @classmethod
    def setUpClass(cls) -> None:
        cls.scratch = tempfile.TemporaryDirectory()
        folder = Path(cls.scratch.name)
        cls.network = torchvision_vit(seed_head=True)
        torch.save(cls.network.state_dict(), folder / "save.pt")
        cls.bundle = folder / "bundle"
        code, out, err = run_import(str(folder / "save.pt"), "--profile", "ccmusic-mel", "--out", str(cls.bundle),
                                    "--licence", "ours")
        assert code == 0, err
        assert len(out.splitlines()) == 1, out
        cls.report = json.loads(out)
        cls.manifest = json.loads((cls.bundle / "model.json").read_text())
        cls.windows = import_checkpoint.synthetic_windows(128, 491)
        with torch.no_grad():
            cls.expected = cls.network(Picture(CCMUSIC, 128, 491)(torch.from_numpy(cls.windows))).numpy()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.scratch.cleanup()

    def logits(self, windows: np.ndarray) -> np.ndarray:
        return import_checkpoint.run_graph(self.bundle / "model.onnx", windows, ["logits"])[0]

    def test_is_what_the_service_loads(self) -> None:
        self.assertEqual(load_with_node(self.bundle), self.report["digest"])
        self.assertEqual(self.manifest["calibration"], "none")
        self.assertEqual(self.manifest["accuracy"], "none")
        self.assertEqual((self.manifest["name"], self.manifest["licence"]), ("save", "ours"))
        self.assertEqual((self.manifest["windows"], self.manifest["aggregation"]), ("all", "vote"))
        self.assertEqual(self.report["parameters"], sum(p.numel() for p in self.network.parameters()))

    def test_a_flipped_byte_or_a_wrong_shape_is_refused_by_the_service(self) -> None:
        weights = self.bundle / "weights.bin"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        changed = bytes(content)
        content[len(content) // 2] ^= 1
        try:
            weights.write_bytes(changed)
            self.assertRegex(load_with_node(self.bundle), r"weights\.bin has SHA-256 .* damaged or was changed")
        finally:
            weights.write_bytes(bytes(content))
        manifest = json.loads((self.bundle / "model.json").read_text())
        text = (self.bundle / "model.json").read_text()
        manifest["graph"]["input"]["shape"] = ["batch", 128, 490]
        try:
            (self.bundle / "model.json").write_text(json.dumps(manifest))
            self.assertRegex(load_with_node(self.bundle), "the profile makes .*491")
        finally:
            (self.bundle / "model.json").write_text(text)

    def test_gives_the_logits_of_torchvisions_own_network(self) -> None:
        logits = self.logits(self.windows)
        self.assertLess(np.abs(logits - self.expected).max(), 1e-3)
        self.assertLess(self.report["logitError"]["max"], 1e-3)
        self.assertGreater(self.expected.std(), 0.01)
        stored = json.loads((self.bundle / "self-test-logits.json").read_text())
        np.testing.assert_allclose(stored, self.expected, atol=1e-5)
        np.testing.assert_array_equal(np.load(self.bundle / "self-test.npy"), self.windows)

    def test_a_broken_front_end_fails_the_same_comparison(self) -> None:
        self.assertGreater(np.abs(self.logits(self.windows[:, ::-1].copy()) - self.expected).max(), 1e-3)
        imagenet = PictureForm("magma", "bottom", (369.6, 496.0), 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            wrong = self.network(Picture(imagenet, 128, 491)(torch.from_numpy(self.windows))).numpy()
        self.assertGreater(np.abs(wrong - self.expected).max(), 1e-3)

    def test_each_front_end_that_the_report_breaks_is_another_front_end(self) -> None:
        for name, run in parity_report.broken_front_ends(self.network, CCMUSIC, (128, 491)).items():
            row = parity_report.compare(run(self.windows), self.expected)
            self.assertGreater(row["maxError"], parity_report.FP32_LOGITS, name)
        intact = parity_report.compare(self.logits(self.windows), self.expected)
        self.assertLess(intact["maxError"], parity_report.FP32_LOGITS)
        self.assertEqual(intact["top1Agreement"], 1)

    def test_takes_any_batch_and_a_window_does_not_feel_its_neighbours(self) -> None:
        together = self.logits(self.windows)
        for i in range(len(self.windows)):
            np.testing.assert_allclose(self.logits(self.windows[i : i + 1])[0], together[i], atol=1e-4)
        self.assertEqual(self.logits(np.repeat(self.windows, 3, axis=0)).shape, (12, 16))

    def test_embeds_at_unit_length(self) -> None:
        embedding = import_checkpoint.run_graph(self.bundle / "model.onnx", self.windows, ["embedding"])[0]
        self.assertEqual(embedding.shape, (4, WIDTH))
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)

    def test_explains_with_shares_that_sum_to_one(self) -> None:
        attention = import_checkpoint.run_graph(self.bundle / "explain.onnx", self.windows, ["attention"])[0]
        self.assertEqual(attention.shape, (4, 7, 7))
        np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, atol=1e-5)

    def test_two_graphs_share_one_weights_file_and_hold_no_big_weights(self) -> None:
        self.assertEqual(sorted(p.name for p in self.bundle.iterdir()),
                         ["explain.onnx", "model.json", "model.onnx", "self-test-logits.json", "self-test.npy",
                          "weights.bin"])
        places = {}
        for name in ("model.onnx", "explain.onnx"):
            graph = onnx.load(str(self.bundle / name), load_external_data=False)
            self.assertLess((self.bundle / name).stat().st_size, 200_000)
            self.assertLessEqual(graph.ir_version, 10)
            self.assertIn(graph.opset_import[0].version, (18, 19, 20))
            for tensor in graph.graph.initializer:
                if tensor.external_data:
                    place = {e.key: e.value for e in tensor.external_data}
                    self.assertEqual(place["location"], "weights.bin")
                    places.setdefault(tensor.name, set()).add((place["offset"], place["length"]))
                else:
                    self.assertLess(len(tensor.raw_data), 1024)
        self.assertTrue(all(len(where) == 1 for where in places.values()))
        self.assertLess((self.bundle / "weights.bin").stat().st_size, 4 * self.report["parameters"] + 2_000_000)

    def test_an_existing_bundle_is_kept_unless_forced_and_other_folders_always(self) -> None:
        checkpoint = str(self.bundle.parent / "save.pt")
        code, out, err = run_import(checkpoint, "--profile", "ccmusic-mel", "--out", str(self.bundle))
        self.assertEqual((code, out), (1, ""))
        self.assertRegex(err, "exists already.*--force")
        code, _, err = run_import(checkpoint, "--profile", "ccmusic-mel", "--out", self.scratch.name, "--force")
        self.assertEqual(code, 1)
        self.assertRegex(err, "no model bundle")
        self.assertTrue(self.bundle.exists())


class AStoppedImport(Folder):
    def test_leaves_nothing_behind(self) -> None:
        torch.save(torchvision_vit().state_dict(), self.folder / "save.pt")
        out = self.folder / "out"
        program = subprocess.Popen(
            [sys.executable, import_checkpoint.__file__, str(self.folder / "save.pt"), "--profile", "ccmusic-mel",
             "--out", str(out / "bundle")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert program.stderr is not None
        for line in program.stderr:
            if line.startswith("exporting"):
                self.assertEqual(len(list(out.iterdir())), 1)
                program.terminate()
                break
        printed, _ = program.communicate(timeout=60)
        self.assertNotEqual(program.returncode, 0)
        self.assertEqual(printed, "")
        self.assertEqual(list(out.iterdir()), [])


class Families(Folder):
    """The real packages' networks; the names that their files have."""

    def check(self, weights: dict[str, Tensor], network: nn.Module, family: str) -> None:
        """Ours, and the package's own rebuilt from the weights, give what ``network`` gives."""
        found = vit_checkpoint.recognise(weights, 224)
        self.assertEqual(found.family, family)
        with torch.no_grad():
            answer = network(PIXELS)
            expected = getattr(answer, "logits", answer)
            ours = vit_checkpoint.build(weights, found)(PIXELS)[0]
            rebuilt = vit_checkpoint.original(weights, found)(PIXELS)
        self.assertGreater(float(expected.std()), 0.01)
        self.assertLess(float((ours - expected).abs().max()), 1e-4)
        self.assertLess(float((rebuilt - expected).abs().max()), 1e-4)

    def test_torchvision_with_a_plain_head(self) -> None:
        network = torchvision_vit()
        self.check(network.state_dict(), network, "torchvision")

    def test_torchvision_as_older_releases_named_it(self) -> None:
        network = torchvision_vit()
        named = {k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
                 for k, v in network.state_dict().items()}
        self.check(named, network, "torchvision")

    def test_timm_with_a_plain_head_and_with_the_seeds(self) -> None:
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as cause:
            self.skipTest(f"timm cannot be imported: {cause}")
        torch.manual_seed(3)
        network = VisionTransformer(patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
                                    mlp_ratio=0.5, num_classes=16).eval()
        self.check(network.state_dict(), network, "timm")
        network.head = parity_checkpoint.seed_head((WIDTH, 40, 30, 20, 16)).eval()
        self.check(network.state_dict(), network, "timm")

    def test_timm_variants_are_refused_by_what_they_do_differently(self) -> None:
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as cause:
            self.skipTest(f"timm cannot be imported: {cause}")
        common = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": HEADS, "num_classes": 4}
        for options, words in (({"global_pool": "avg", "class_token": True}, "averages the patch tokens"),
                               ({"init_values": 0.1}, "layer scale"), ({"reg_tokens": 4}, "register tokens"),
                               ({"pre_norm": True}, "before the first block"), ({"qk_norm": True}, "queries and keys")):
            with self.subTest(words), self.assertRaisesRegex(ImportFault, words):
                vit_checkpoint.recognise(VisionTransformer(**common, **options).state_dict(), 224)

    def test_hugging_face_in_memory_and_as_saved(self) -> None:
        try:
            from transformers import ViTConfig, ViTForImageClassification
        except ImportError as cause:
            self.skipTest(f"transformers cannot be imported: {cause}")
        torch.manual_seed(3)
        network = ViTForImageClassification(ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP,
            patch_size=PATCH, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2},
        )).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.check(network.state_dict(), network, "Hugging Face")
        with contextlib.redirect_stderr(io.StringIO()):
            network.save_pretrained(self.folder)
        weights, _ = checkpoint_file.read(self.folder / "model.safetensors")
        self.assertIn("vit.encoder.layer.0.attention.attention.query.weight", weights)
        self.check(weights, network, "Hugging Face")
        beside = import_checkpoint._config_beside(self.folder / "model.safetensors")
        self.assertEqual(beside, {"heads": HEADS, "eps": 1e-12, "labels": ["a", "b", "c"]})


class Wrapping(Folder):
    def test_is_undone(self) -> None:
        state = {k: v.clone() for k, v in torchvision_vit().state_dict().items()}
        optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])

        def prefixed(prefix: str) -> dict[str, Tensor]:
            return OrderedDict((prefix + k, v) for k, v in state.items())

        wrapped: list[Any] = [
            {"state_dict": state}, {"model": state}, prefixed("module."), prefixed("model."),
            {"state_dict": prefixed("module.model.")}, {"model": {"state_dict": prefixed("_orig_mod.")}},
            {"epoch": 7, "model_state_dict": state, "optimizer": optimiser.state_dict(),
             "best_acc": np.float64(0.5), "history": np.arange(3.0)},
        ]
        for content in wrapped:
            torch.save(content, self.folder / "wrapped.pt")
            weights, remarks = checkpoint_file.read(self.folder / "wrapped.pt")
            self.assertEqual(weights.keys(), state.keys())
            self.assertTrue(all(torch.equal(weights[k], state[k]) for k in state))
            self.assertTrue(remarks)

    def test_the_old_file_format_is_read_too(self) -> None:
        state = torchvision_vit().state_dict()
        torch.save(state, self.folder / "old.pt", _use_new_zipfile_serialization=False)
        self.assertEqual(checkpoint_file.read(self.folder / "old.pt")[0].keys(), state.keys())


class TouchesAFile:
    """What a hostile pickle holds: unpickling it would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class BadInput(Folder):
    """Each is refused in one sentence that names the cause, and nothing is left behind."""

    def setUp(self) -> None:
        super().setUp()
        self.state = {k: v.clone() for k, v in torchvision_vit().state_dict().items()}
        self.inside = self.folder / "out"
        self.inside.mkdir()

    def refused(self, pattern: str, *args: str, checkpoint: str = "bad.pt", profile: str = "ccmusic-mel") -> str:
        code, out, err = run_import(str(self.folder / checkpoint), "--profile", profile,
                                    "--out", str(self.inside / "bundle"), *args)
        self.assertEqual((code, out), (1, ""), err)
        fault = err.splitlines()[-1]
        self.assertRegex(fault, pattern)
        self.assertTrue(fault.endswith("."), fault)
        self.assertNotIn("Traceback", err)
        self.assertEqual(list(self.inside.iterdir()), [])
        return fault

    def save(self, content: Any) -> Path:
        torch.save(content, self.folder / "bad.pt")
        return self.folder / "bad.pt"

    def test_a_truncated_checkpoint(self) -> None:
        path = self.save(self.state)
        whole = path.read_bytes()
        for share in (0.1, 0.5, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            self.refused("is truncated")
        torch.save(self.state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-1000])
        self.refused("truncated|damaged")

    def test_a_checkpoint_with_one_changed_byte(self) -> None:
        path = self.save(self.state)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(bytes(content))
        self.refused("is damaged: 1 of its .* checksum")

    def test_a_pickle_with_code_is_not_run(self) -> None:
        target = self.folder / "was-run"
        self.save({"state_dict": TouchesAFile(target)})
        self.refused(r"holds code and was not run.*system")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with self.subTest(protocol=protocol):
                with (self.folder / "bad.pt").open("wb") as file:
                    pickle.dump(TouchesAFile(target), file, protocol)
                self.refused(r"holds code and was not run.*system")
        self.assertFalse(target.exists())

    def test_weights_pickled_by_another_protocol(self) -> None:
        torch.save(self.state, self.folder / "bad.pt", pickle_protocol=4)
        self.refused("pickled with a protocol that is not read")

    def test_a_whole_model_that_was_saved(self) -> None:
        self.save(torchvision_vit())
        self.refused(r"would have to call torchvision\.models.*save model\.state_dict\(\) instead")

    def test_files_that_are_no_checkpoints(self) -> None:
        path = self.folder / "bad.pt"
        self.refused("cannot be read")
        for content, pattern in (
            (b"", "is empty"),
            (b"just some text\n", "damaged or no PyTorch checkpoint|no PyTorch checkpoint"),
            (b"<!DOCTYPE html><html></html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 344000000\n",
             "Git LFS pointer.*344 MB.*git lfs pull"),
            (b"PK\x05\x06" + b"\0" * 18, "ZIP archive of something else"),
        ):
            with self.subTest(pattern):
                path.write_bytes(content)
                self.refused(pattern)
        self.save([1, 2, 3])
        self.refused("holds a list, not the weights")
        self.save({"epoch": 3, "lr": 0.1})
        self.refused("holds no weights: a dictionary with the keys epoch, lr")
        (self.folder / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
        self.refused("truncated, damaged or no safetensors", checkpoint="bad.safetensors")
        self.refused("is a folder", checkpoint="out")

    def test_the_weights_of_another_network(self) -> None:
        from torchvision.models import resnet18

        self.save(resnet18().state_dict())
        self.refused(r"weights of another network: known are .*torchvision.*timm.*Hugging Face.*conv1\.weight")

    def test_missing_and_unexpected_keys_are_named(self) -> None:
        del self.state["encoder.ln.bias"]
        self.state["encoder.extra"] = torch.zeros(1)
        self.save(self.state)
        self.refused(r"1 missing: encoder\.ln\.bias; 1 unexpected: encoder\.extra")
        for i in range(14):
            self.state[f"more.{i:02d}"] = torch.zeros(1)
        self.save(self.state)
        self.refused(r"15 unexpected: encoder\.extra, more\.00, .*more\.08 and 5 more\.$")

    def test_a_checkpoint_without_its_head(self) -> None:
        self.save({k: v for k, v in self.state.items() if not k.startswith("heads")})
        self.refused(r"2 missing: heads\.head\.weight, heads\.head\.bias")

    def test_a_head_of_unknown_layers(self) -> None:
        for key in ("heads.head.weight", "heads.head.bias"):
            del self.state[key]
        for i, (a, b) in ((0, (WIDTH, 40)), (2, (40, 16))):
            self.state[f"heads.head.{i}.weight"] = torch.zeros(b, a)
            self.state[f"heads.head.{i}.bias"] = torch.zeros(b)
        self.save(self.state)
        self.refused("head has 2 layers .*four-layer head at 1, 4, 7 and 9")

    def test_shapes_that_disagree(self) -> None:
        self.state["encoder.layers.encoder_layer_1.mlp.3.weight"] = torch.zeros(WIDTH, MLP + 1)
        self.save(self.state)
        self.refused(rf"1 shapes? disagree.*mlp\.3\.weight is \[192, 97\] and must be \[192, {MLP}\]")

    def test_pictures_of_another_size(self) -> None:
        self.state["encoder.pos_embedding"] = torch.zeros(1, 145, WIDTH)
        self.save(self.state)
        self.refused(r"pictures of 384 px in patches of 32; the profile draws 224 px")

    def test_weights_that_are_no_numbers(self) -> None:
        self.state["encoder.ln.weight"][3] = float("nan")
        self.save(self.state)
        self.refused(r"no numbers or infinite: encoder\.ln\.weight")

    def test_tensors_that_are_no_plain_numbers(self) -> None:
        key = "conv_proj.weight"
        plain = self.state[key]
        for content, pattern in (
            (plain.to(torch.int8), f"hold int8 values.*{key}"),
            (plain.to(torch.complex64), f"hold complex64 values.*{key}"),
            (plain.to_sparse(), f"are sparse, first {key}"),
            (torch.empty_like(plain, device="meta"), f"are empty .*first {key}"),
        ):
            with self.subTest(pattern):
                self.save(self.state | {key: content})
                self.refused(pattern)

    def test_a_width_that_does_not_tell_the_heads(self) -> None:
        from torchvision.models import VisionTransformer

        self.save(VisionTransformer(224, 32, 1, 2, 48, 48, num_classes=16).state_dict())
        self.refused("number of attention heads.*width 48.*--heads")
        self.refused("--heads 5 does not divide the width 48", "--heads", "5")

    def test_labels(self) -> None:
        self.save(self.state)
        labels = self.folder / "labels.txt"
        article = import_profile.load("ccmusic-mel")["refusedLabels"]["labels"]
        for content, pattern in (
            ("\n".join("abcdefghijklmno"), "Too few labels: 15 for a network with 16 outputs"),
            ("\n".join("abcdefghijklmnopq"), "Too many labels: 17 for a network with 16 outputs"),
            ("\n".join("abcdefghijklmnoa"), "Labels repeat: a"),
            ("a\n\nb\n", "Label 2 of 3 is empty"),
            ("", "list of labels is empty"),
            ("\n".join(article), "16 labels are refused for ccmusic-mel.*wrong name"),
            ('{"a": 1}', "is JSON, but no list of names"),
            ('["a", ', "is not JSON"),
        ):
            with self.subTest(pattern):
                labels.write_text(content)
                self.refused(pattern, "--labels", str(labels))
        self.refused("labels file .* cannot be read", "--labels", str(self.folder / "none.txt"))
        self.refused("No labels: the profile default-mel has none", profile="default-mel")

    def test_profiles(self) -> None:
        self.save(self.state)
        self.refused(r"neither a shipped one \(ccmusic-mel, default-mel\)", profile="nothing")
        path = self.folder / "profile.json"
        path.write_text("{")
        self.refused("is not JSON", profile=str(path))
        given = import_profile.load("ccmusic-mel")
        del given["profile"]["hopLength"]
        given["profile"]["power"] = 3
        given["profile"]["speed"] = 1
        given["picture"]["colour"] = "no-such-map"
        given["picture"]["std"] = [0.5, 0, 0.5]
        del given["windows"]
        path.write_text(json.dumps(given))
        fault = self.refused("profile.*cannot be used", profile=str(path))
        for part in ("windows is missing", "profile.hopLength is missing", "profile.power is 3, not 1 or 2",
                     "profile.speed is not a field", 'picture.colour is "no-such-map"', "picture.std is"):
            self.assertIn(part, fault)

    def test_arguments(self) -> None:
        self.save(self.state)
        self.refused("--name Ü? cannot be a model's name|--name", "--name", "Ü")
        self.refused("invalid choice", "--precision", "fp8")


class Profiles(unittest.TestCase):
    def test_the_checked_fields_are_those_of_the_services_schema(self) -> None:
        source = ("import { profileSchema } from './packages/shared/src/bundle.ts';"
                  "console.log(JSON.stringify(Object.keys(profileSchema.shape)))")
        done = subprocess.run([own_audio.find_node(), "--input-type=module", "-e", source],
                              capture_output=True, text=True, check=True, cwd=ROOT)
        self.assertEqual(sorted(json.loads(done.stdout)), sorted(import_profile._PROFILE))


class Rollout(unittest.TestCase):
    config = vision_transformer.VitConfig(32, 8, 8, 3, 2, 8, True, 1e-6, (8, 2))

    def test_is_the_product_of_half_attention_half_identity(self) -> None:
        torch.manual_seed(1)
        layers = [torch.rand(2, 2, 17, 17).softmax(dim=3) for _ in range(3)]
        product = torch.eye(17).expand(2, 17, 17)
        for attention in layers:
            product = (0.5 * attention.mean(dim=1) + 0.5 * torch.eye(17)) @ product
        expected = product[:, 0, 1:] / product[:, 0, 1:].sum(dim=1, keepdim=True)
        found = vision_transformer.VisionTransformer(self.config).rollout(layers)
        torch.testing.assert_close(found, expected.reshape(2, 4, 4))

    def test_row_0_is_the_lowest_in_pitch(self) -> None:
        """A network built to look only at the picture's bottom row of patches."""
        vit = vision_transformer.VisionTransformer(self.config).eval()
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.zero_()
            for block in vit.blocks:
                block.norm1.weight.fill_(1)
                # Keys copy the token, queries ask for its first value, whatever the token.
                block.qkv.weight[8:16] = torch.eye(8)
                block.qkv.bias[0] = block.qkv.bias[4] = 8.0
            vit.position[0, 13:17, 0] = vit.position[0, 13:17, 4] = 1.0
        for lowest, row in (("bottom", 0), ("top", 3)):
            form = PictureForm("grey", lowest, None, 32, (0, 0, 0), (1, 1, 1))
            network = vision_transformer.ImportedNetwork(Picture(form, 16, 16), vit)
            with torch.no_grad():
                attention = network(torch.zeros(1, 16, 16, dtype=torch.uint8))[2][0]
            self.assertEqual(int(attention.sum(dim=1).argmax()), row)
            self.assertGreater(float(attention[row].sum()), 0.9)


class ReadyOnnxFiles(Folder):
    """Graphs that come as they are: channel means, one linear layer."""

    def graph(self, *, pixels: bool = True, batch: str | int = "n", softmax: bool = False, classes: int = 3,
              shape: list[int] | None = None, twice: bool = False) -> Path:
        kind = TensorProto.FLOAT if pixels else TensorProto.UINT8
        shape = shape or ([3, 224, 224] if pixels else [128, 128])
        draw = np.random.default_rng(2)
        features = 3 if pixels else 128
        weights = numpy_helper.from_array(draw.normal(size=(features, classes)).astype(np.float32), "logits")
        nodes = [] if pixels else [helper.make_node("Cast", ["windows_"], ["x"], to=TensorProto.FLOAT)]
        source = "windows" if pixels else "x"
        axes = [2, 3] if pixels else [2]
        nodes += [
            helper.make_node("ReduceMean", [source, "axes"], ["mean"], keepdims=0),
            # Names that the bundle uses for something else must not get in each other's way.
            helper.make_node("MatMul", ["mean", "logits"], ["score"]),
        ]
        if softmax:
            nodes.append(helper.make_node("Softmax", ["score"], ["answer"], axis=1))
        out = helper.make_tensor_value_info("answer" if softmax else "score", TensorProto.FLOAT, [batch, classes])
        mean = helper.make_tensor_value_info("mean", TensorProto.FLOAT, [batch, features])
        outputs = [out, mean] if twice else [out]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("windows" if pixels else "windows_", kind, [batch, *shape])],
            outputs, [weights, numpy_helper.from_array(np.array(axes), "axes")])
        path = self.folder / "ready.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path),
                  save_as_external_data=True, location="beside.bin", size_threshold=60)
        return path

    def imported(self, path: Path, *more: str, code: int = 0) -> tuple[Path, str, str]:
        labels = self.folder / "labels.txt"
        labels.write_text("a\nb\nc\n")
        out = self.folder / "bundles" / "one"
        got, printed, err = run_import(str(path), "--profile", "default-mel", "--labels", str(labels), "--out",
                                       str(out), "--force", *more)
        self.assertEqual(got, code, err)
        if code:
            self.assertFalse(out.exists())
        return out, printed, err.splitlines()[-1]

    def test_pictures_are_put_behind_the_profiles_picture(self) -> None:
        path = self.graph()
        out, printed, _ = self.imported(path)
        self.assertLess(json.loads(printed)["logitError"]["max"], 1e-4)
        self.assertRegex(load_with_node(out), r"^[0-9a-f]{64}$")
        windows = import_checkpoint.synthetic_windows(128, 128)
        logits = import_checkpoint.run_graph(out / "model.onnx", windows, ["logits"])[0]
        # Grey levels around their mean, the same in three channels.
        expected = (windows.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
        weights = numpy_helper.to_array(onnx.load(str(path)).graph.initializer[0])
        np.testing.assert_allclose(logits, expected[:, None] * weights.sum(axis=0), atol=5e-3)

    def test_windows_are_taken_as_they_are_and_a_softmax_is_taken_off(self) -> None:
        out, printed, _ = self.imported(self.graph(pixels=False, softmax=True))
        report = json.loads(printed)
        self.assertTrue(any("softmax" in w for w in report["warnings"]))
        windows = np.load(out / "self-test.npy")
        logits = import_checkpoint.run_graph(out / "model.onnx", windows, ["logits"])[0]
        weights = numpy_helper.to_array(onnx.load(str(self.folder / "ready.onnx")).graph.initializer[0])
        np.testing.assert_allclose(logits, windows.mean(axis=2) @ weights, rtol=1e-4)

    def test_what_does_not_fit_is_refused(self) -> None:
        self.assertRegex(self.imported(self.graph(shape=[3, 64, 64]), code=1)[2], "must be uint8 .* or float")
        self.assertRegex(self.imported(self.graph(batch=1), code=1)[2], "fixed batch of 1")
        self.assertRegex(self.imported(self.graph(classes=5), code=1)[2], "Too few labels: 3 .* 5 outputs")
        self.assertRegex(self.imported(self.graph(twice=True), code=1)[2], "has 2 outputs .*--output")
        self.imported(self.graph(twice=True), "--output", "score")
        path = self.graph()
        (self.folder / "beside.bin").unlink()
        import shutil

        shutil.rmtree(self.folder / "bundles")
        self.assertRegex(self.imported(path, code=1)[2], "weights in is missing|truncated, damaged")
        path.write_bytes(path.read_bytes()[:40])
        self.assertRegex(self.imported(path, code=1)[2], "truncated, damaged or no ONNX file")


if __name__ == "__main__":
    unittest.main()
