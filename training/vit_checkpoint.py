"""How torchvision, timm and Hugging Face name a Vision Transformer's tensors.

`recognise` accounts for every key and shape of a checkpoint, `build` fills our network
with it, `original` the package's own, to compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from checkpoint_file import Weights
from import_profile import ImportFault
from vision_transformer import VisionTransformer, VitConfig

# Width of one head in the published sizes; other widths need --heads, since no tensor's
# shape depends on the number of heads.
KNOWN_HEADS: Final = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True)
class Dialect:
    """How one package names the tensors. ``{i}`` is the block, ``*`` weight and bias."""

    family: str
    eps: float
    cls: str
    position: str
    patch: str
    norm: str
    block: str
    qkv: tuple[str, ...]
    """One matrix, or queries, keys and values."""
    proj: str
    norm1: str
    norm2: str
    fc1: str
    fc2: str
    heads: tuple[str, ...]
    """What may stand before the head's own names."""


_TORCHVISION: Final[dict[str, Any]] = {
    "family": "torchvision", "eps": 1e-6, "cls": "class_token", "position": "encoder.pos_embedding",
    "patch": "conv_proj.*", "norm": "encoder.ln.*", "block": "encoder.layers.encoder_layer_{i}.",
    "qkv": ("self_attention.in_proj_*",), "proj": "self_attention.out_proj.*",
    "norm1": "ln_1.*", "norm2": "ln_2.*", "heads": ("heads.head.", "heads."),
}
_HUGGING_FACE: Final[dict[str, Any]] = {
    "family": "Hugging Face", "eps": 1e-12, "cls": "vit.embeddings.cls_token",
    "position": "vit.embeddings.position_embeddings", "patch": "vit.embeddings.patch_embeddings.projection.*",
    "norm": "vit.layernorm.*", "norm1": "layernorm_before.*", "norm2": "layernorm_after.*",
    "heads": ("classifier.",),
}
DIALECTS: Final = (
    Dialect(**_TORCHVISION, fc1="mlp.0.*", fc2="mlp.3.*"),
    Dialect(**_TORCHVISION, fc1="mlp.linear_1.*", fc2="mlp.linear_2.*"),
    Dialect(
        family="timm", eps=1e-6, cls="cls_token", position="pos_embed", patch="patch_embed.proj.*",
        norm="norm.*", block="blocks.{i}.", qkv=("attn.qkv.*",), proj="attn.proj.*",
        norm1="norm1.*", norm2="norm2.*", fc1="mlp.fc1.*", fc2="mlp.fc2.*", heads=("head.",),
    ),
    Dialect(
        **_HUGGING_FACE, block="vit.encoder.layer.{i}.",
        qkv=tuple(f"attention.attention.{part}.*" for part in ("query", "key", "value")),
        proj="attention.output.dense.*", fc1="intermediate.dense.*", fc2="output.dense.*",
    ),
    # transformers 5 in memory; its saved files keep the names above.
    Dialect(
        **_HUGGING_FACE, block="vit.layers.{i}.",
        qkv=tuple(f"attention.{part}_proj.*" for part in "qkv"),
        proj="attention.o_proj.*", fc1="mlp.fc1.*", fc2="mlp.fc2.*",
    ),
)
FAMILIES: Final = (
    "torchvision (conv_proj, encoder.layers), timm (patch_embed, blocks) and Hugging Face "
    "ViTForImageClassification (vit.embeddings)"
)
# Parts of relatives that compute something else: (part of a key, what it is).
_RELATIVES: Final = (
    ("fc_norm.", "it averages the patch tokens (fc_norm) instead of reading the CLS token"),
    ("dist_token", "it is a distilled DeiT with a second class token (dist_token)"),
    ("head_dist.", "it is a distilled DeiT with a second head (head_dist)"),
    ("reg_token", "it has register tokens (reg_token)"),
    ("norm_pre.", "it normalises before the first block (norm_pre), as CLIP does"),
    (".ls1.", "it scales every branch (ls1, layer scale)"),
    ("layer_scale", "it scales every branch (layer scale)"),
    (".gamma_1", "it scales every branch (gamma_1)"),
    ("relative_position_bias", "it has relative positions, as BEiT does"),
    (".q_norm.", "it normalises queries and keys (q_norm)"),
    ("attn_pool.", "it pools by attention (attn_pool)"),
    ("pre_logits.", "it has a pre-logits layer in its head"),
)
# The seed's head: dropouts at 0, 3 and 6, ReLU at 2, 5 and 8, linear layers between.
_SEED_HEAD: Final = (1, 4, 7, 9)


@dataclass(frozen=True)
class Recognised:
    dialect: Dialect
    config: VitConfig
    head_keys: tuple[str, ...]
    """The linear layers of the head as the file names them, without weight and bias."""
    head_kind: str
    """``linear`` or ``seed``."""

    @property
    def family(self) -> str:
        return self.dialect.family

    @property
    def architecture(self) -> str:
        c = self.config
        head = " -> ".join(map(str, c.head))
        return (f"{self.family} ViT, {c.image_size} px in patches of {c.patch}, width {c.width}, "
                f"{c.depth} blocks, {c.heads} heads, mlp {c.mlp}, head {head}")


def _both(pattern: str) -> tuple[str, str]:
    return pattern.replace("*", "weight"), pattern.replace("*", "bias")


def _block_names(d: Dialect, i: int, qkv_bias: bool = True) -> list[str]:
    at = d.block.format(i=i)
    names = [at + n for part in (d.proj, d.norm1, d.norm2, d.fc1, d.fc2) for n in _both(part)]
    for part in d.qkv:
        names += [at + n for n in (_both(part) if qkv_bias else _both(part)[:1])]
    return names


def _depth(d: Dialect, weights: Weights) -> int:
    before = d.block.split("{i}")[0]
    found = [key.removeprefix(before).split(".")[0] for key in weights if key.startswith(before)]
    return 1 + max((int(part) for part in found if part.isdecimal()), default=-1)


def _trunk_names(d: Dialect) -> list[str]:
    return [d.cls, d.position, *_both(d.patch), *_both(d.norm)]


def _named(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def recognise(weights: Weights, image_size: int, heads: int | None = None, eps: float | None = None) -> Recognised:
    """Which ViT the weights belong to, every key accounted for and every shape checked.

    :param heads: attention heads, where the width does not tell.
    :param eps: of the layer norms, where the family's own is not it.
    :raises ImportFault: another network, missing or unexpected keys, shapes that disagree.
    """

    def matched(d: Dialect) -> int:
        known = {*_trunk_names(d)}
        for i in range(_depth(d, weights)):
            known.update(_block_names(d, i))
        return len(known & weights.keys())

    dialect = max(DIALECTS, key=matched)
    if matched(dialect) < 0.5 * len(weights) or matched(dialect) < 12:
        raise ImportFault(
            f"These are the weights of another network: known are Vision Transformers of {FAMILIES}; "
            f"the {len(weights)} keys of this one begin with {_named(list(weights))}."
        )
    for part, what in _RELATIVES:
        found = [key for key in weights if part in key or key.startswith(part.lstrip("."))]
        if found:
            raise ImportFault(
                f"This {dialect.family} ViT is a variant that cannot be imported: {what}; key {found[0]}. "
                "Export it to ONNX with your own code and import that file."
            )
    depth = _depth(dialect, weights)
    qkv_bias = any(dialect.block.format(i=i) + _both(dialect.qkv[0])[1] in weights for i in range(depth))
    head_keys, kind = _head(dialect, weights)
    expected = [*_trunk_names(dialect), *(n for i in range(depth) for n in _block_names(dialect, i, qkv_bias)),
                *(f"{key}.{part}" for key in head_keys for part in ("weight", "bias"))]
    _strict(dialect.family, expected, weights)
    config = _measure(dialect, weights, image_size, depth, qkv_bias, head_keys, heads, eps)
    _check_shapes(dialect, weights, config, head_keys)
    foreign = [key for key in expected if not weights[key].is_floating_point()]
    if foreign:
        kind = str(weights[foreign[0]].dtype).removeprefix("torch.")
        raise ImportFault(f"{len(foreign)} tensors hold {kind} values, which are no weights by themselves "
                          f"(quantised without their scales?): {_named(foreign)}.")
    broken = [key for key in expected if not bool(torch.isfinite(weights[key].float()).all())]
    if broken:
        raise ImportFault(f"{len(broken)} tensors hold values that are no numbers or infinite: {_named(broken)}.")
    return Recognised(dialect, config, head_keys, kind)


def _head(d: Dialect, weights: Weights) -> tuple[tuple[str, ...], str]:
    """The head's linear layers as they are named, in order, and its kind."""
    plain = d.heads[0].rstrip(".")
    found = sorted({key.rsplit(".", 1)[0] for key in weights if key.startswith(d.heads)})
    for before in d.heads:
        indices = [int(k.removeprefix(before)) for k in found if k.removeprefix(before).isdecimal()]
        if found and len(indices) == len(found):
            indices.sort()
            keys = tuple(f"{before}{i}" for i in indices)
            if len(keys) == 1:
                return keys, "linear"
            if set(indices) <= set(_SEED_HEAD):
                return tuple(f"{before}{i}" for i in _SEED_HEAD), "seed"
            raise ImportFault(
                f"The head has {len(keys)} layers ({', '.join(keys)}): what lies between them is not in the "
                "weights. Known are one linear layer and the four-layer head at 1, 4, 7 and 9."
            )
    if len(found) == 1 and found[0] in {before.rstrip(".") for before in d.heads}:
        return (found[0],), "linear"
    return (plain,), "linear"


def _strict(family: str, expected: list[str], weights: Weights) -> None:
    missing = [key for key in expected if key not in weights]
    unexpected = sorted(set(weights) - set(expected))
    said = [f"{len(keys)} {kind}: {_named(keys)}"
            for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if said:
        raise ImportFault(f"The keys are not those of a {family} ViT; {'; '.join(said)}.")


def _measure(
    d: Dialect, weights: Weights, image_size: int, depth: int, qkv_bias: bool,
    head_keys: tuple[str, ...], heads: int | None, eps: float | None,
) -> VitConfig:
    patch = weights[_both(d.patch)[0]]
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3]:
        raise ImportFault(
            f"{_both(d.patch)[0]} has the shape {_shape(patch)}: a picture has 3 channels and square patches.")
    width, size = int(patch.shape[0]), int(patch.shape[2])
    position = weights[d.position]
    places = int(position.shape[1]) if position.ndim == 3 else 0
    grid = math.isqrt(max(0, places - 1))
    if position.ndim != 3 or grid**2 + 1 != places or grid * size != image_size:
        side = f"pictures of {grid * size} px" if grid**2 + 1 == places else "something other than a square of patches"
        raise ImportFault(
            f"{d.position} has the shape {_shape(position)}, made for {side} in patches of {size}; "
            f"the profile draws {image_size} px ({image_size // size} x {image_size // size} patches)."
        )
    known = KNOWN_HEADS.get(width)
    if heads is None and known is None:
        raise ImportFault(
            f"The number of attention heads cannot be told from the weights at width {width}: give it with --heads."
        )
    if heads is not None and (heads < 1 or width % heads):
        raise ImportFault(f"--heads {heads} does not divide the width {width}.")
    first = d.block.format(i=0)
    sizes = [width]
    for key in head_keys:
        matrix = weights[f"{key}.weight"]
        if matrix.ndim != 2:
            raise ImportFault(f"{key}.weight has the shape {_shape(matrix)}, not [outputs, inputs].")
        sizes.append(int(matrix.shape[0]))
    return VitConfig(
        image_size=image_size, patch=size, width=width, depth=depth, heads=heads or known or 0,
        mlp=int(weights[first + _both(d.fc1)[0]].shape[0]), qkv_bias=qkv_bias,
        eps=d.eps if eps is None else eps, head=tuple(sizes),
    )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_shapes(d: Dialect, weights: Weights, c: VitConfig, head_keys: tuple[str, ...]) -> None:
    w = c.width
    wanted: dict[str, list[int]] = {
        d.cls: [1, 1, w], d.position: [1, c.grid**2 + 1, w],
        _both(d.patch)[0]: [w, 3, c.patch, c.patch], _both(d.patch)[1]: [w],
        _both(d.norm)[0]: [w], _both(d.norm)[1]: [w],
    }
    rows = w * (3 if len(d.qkv) == 1 else 1)
    for i in range(c.depth):
        at = d.block.format(i=i)
        for part, shape in ((d.proj, [w, w]), (d.fc1, [c.mlp, w]), (d.fc2, [w, c.mlp]),
                            *((q, [rows, w]) for q in d.qkv)):
            wanted[at + _both(part)[0]] = shape
            wanted[at + _both(part)[1]] = shape[:1]
        for part in (d.norm1, d.norm2):
            wanted[at + _both(part)[0]] = wanted[at + _both(part)[1]] = [w]
    for key, into, out in zip(head_keys, c.head, c.head[1:], strict=False):
        wanted[f"{key}.weight"], wanted[f"{key}.bias"] = [out, into], [out]
    wrong = [f"{key} is {_shape(weights[key])} and must be {shape}"
             for key, shape in wanted.items() if key in weights and list(weights[key].shape) != shape]
    if wrong:
        raise ImportFault(f"{len(wrong)} shapes disagree: {'; '.join(wrong[:10])}.")


def build(weights: Weights, r: Recognised) -> VisionTransformer:
    """Our network with the recognised weights, float32, in evaluation mode."""
    d, c = r.dialect, r.config
    state: Weights = {"cls": weights[d.cls], "position": weights[d.position]}

    def take(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            key = theirs.replace("*", kind)
            if key in weights:
                state[f"{ours}.{kind}"] = weights[key]

    take("patch", d.patch)
    take("norm", d.norm)
    for i in range(c.depth):
        at = d.block.format(i=i)
        for ours in ("proj", "norm1", "norm2", "fc1", "fc2"):
            take(f"blocks.{i}.{ours}", at + getattr(d, ours))
        for kind in ("weight", "bias"):
            parts = [weights[key] for q in d.qkv if (key := at + q.replace("*", kind)) in weights]
            if parts:
                state[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    for i, key in enumerate(r.head_keys):
        take(f"head.{i}", f"{key}.*")
    vit = VisionTransformer(c)
    vit.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    return vit.eval()


class _HuggingFaceLogits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> Tensor:
        return self.network(picture).logits


def _original_head(r: Recognised) -> nn.Module:
    c = r.config
    if r.head_kind == "linear":
        return nn.Linear(c.head[0], c.head[-1])
    layers: list[nn.Module] = []
    for i, (into, out) in enumerate(zip(c.head, c.head[1:], strict=False)):
        layers += [nn.Dropout(), nn.Linear(into, out), nn.ReLU()] if i < 3 else [nn.Linear(into, out)]
    return nn.Sequential(*layers)


def original(weights: Weights, r: Recognised) -> nn.Module:
    """The package's own network with these weights, loaded strictly: pictures -> logits.

    :raises ImportError: the package is not installed.
    """
    c = r.config
    weights = {key: value.float() for key, value in weights.items()}
    if r.family == "torchvision":
        from torchvision.models import VisionTransformer as TorchvisionVit

        network = TorchvisionVit(
            image_size=c.image_size, patch_size=c.patch, num_layers=c.depth, num_heads=c.heads,
            hidden_dim=c.width, mlp_dim=c.mlp, num_classes=c.head[-1],
            norm_layer=partial(nn.LayerNorm, eps=c.eps),
        )
        network.heads = nn.Sequential()
        network.heads.add_module("head", _original_head(r))
        # Names that older releases wrote, and heads that stand one level higher.
        renamed = {}
        for key, value in weights.items():
            key = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
            renamed[key] = value
        weights = _with_head(renamed, r, "heads.head")
        network.load_state_dict(weights, strict=True)
        return network.eval()
    if r.family == "timm":
        from timm.models.vision_transformer import VisionTransformer as TimmVit

        timm_network = TimmVit(
            img_size=c.image_size, patch_size=c.patch, embed_dim=c.width, depth=c.depth, num_heads=c.heads,
            mlp_ratio=c.mlp / c.width, qkv_bias=c.qkv_bias, num_classes=c.head[-1],
            norm_layer=partial(nn.LayerNorm, eps=c.eps),
        )
        timm_network.head = _original_head(r)
        timm_network.load_state_dict(_with_head(weights, r, "head"), strict=True)
        return timm_network.eval()
    from transformers import ViTConfig, ViTForImageClassification

    network = ViTForImageClassification(ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        intermediate_size=c.mlp, layer_norm_eps=c.eps, image_size=c.image_size, patch_size=c.patch,
        qkv_bias=c.qkv_bias, num_labels=c.head[-1],
    ))
    network.classifier = _original_head(r)
    weights = _with_head(weights, r, "classifier")
    own = network.state_dict()
    if own.keys() != weights.keys():
        weights = _renamed(weights, r.dialect, own, c.depth)
    network.load_state_dict(weights, strict=True)
    return _HuggingFaceLogits(network.eval())


def _with_head(weights: Weights, r: Recognised, at: str) -> Weights:
    """The same weights with the head's keys where `original` put the head."""
    names = [at] if r.head_kind == "linear" else [f"{at}.{i}" for i in _SEED_HEAD]
    out = {key: v for key, v in weights.items() if key.rsplit(".", 1)[0] not in r.head_keys}
    for theirs, ours in zip(r.head_keys, names, strict=True):
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    return out


def _renamed(weights: Weights, given: Dialect, own: Weights, depth: int) -> Weights:
    """Between the two namings that transformers has had."""
    other = next(d for d in DIALECTS if d.family == given.family and d.block.format(i=0) + _both(d.fc1)[0] in own)
    names: dict[str, str] = {}
    for i in range(depth):
        for a, b in zip(_block_names(given, i), _block_names(other, i), strict=True):
            names[a] = b
    return {names.get(key, key): value for key, value in weights.items()}
