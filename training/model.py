"""The network: a Vision Transformer of 14 x 14 patches behind a convolutional stem.

A plain ViT cuts patches with one linear map and has to learn locality from data;
with fewer than 5,000 clips it does not. A small residual stem gives the patches
their local features, and the transformer relates them over time and frequency.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 224
GRID = 14


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape."""

    classes: int = 15
    dim: int = 192
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 3.0
    stem: tuple[int, int, int] = (48, 96, 160)
    blocks: tuple[int, int, int] = (1, 2, 2)
    drop_path: float = 0.1
    dropout: float = 0.2
    keep_tokens: float = 0.6
    mean: float = 0.45
    std: float = 0.25

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, object]) -> "ModelConfig":
        known = dict(values)
        for key in ("stem", "blocks"):
            known[key] = tuple(known[key])  # type: ignore[arg-type]
        return ModelConfig(**known)  # type: ignore[arg-type]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; [n, c, h, w] -> [n, c2, h/s, w/s]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride) if stride != 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Stem(nn.Module):
    """Image [n, 1, 224, 224] -> features [n, c, 14, 14]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, b, c = config.stem
        # The image was enlarged 1.75 times from 128 x 128: a stride of 4 (2.3
        # cells) after 7 x 7 taps loses little and keeps the costly sizes small.
        self.entry = nn.Sequential(
            nn.Conv2d(1, a, 7, 4, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU()
        )
        stages: list[nn.Module] = []
        inputs = a
        for outputs, count, stride in zip((a, b, c), config.blocks, (1, 2, 2)):
            for i in range(count):
                stages.append(ResidualBlock(inputs, outputs, stride if i == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.entry(x))


class Layer(nn.Module):
    """Pre-norm transformer layer on tokens [n, t, dim]."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * config.mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def attention(self, x: Tensor) -> Tensor:
        """Self-attention written out: every exporter and provider has it, and at 118
        tokens its backward pass is faster on a CPU than the fused kernel's."""
        n, t, dim = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        y = weights @ v
        return self.out(y.transpose(1, 2).reshape(n, t, dim))

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: leaves a branch out for some samples while training."""
        if not self.training or self.drop_path == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1.0 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attention(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class GenreViT(nn.Module):
    """windows uint8 [n, 128, 128] -> (logits [n, classes], embedding [n, dim])."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.stem = Stem(config)
        self.to_tokens = nn.Conv2d(config.stem[2], dim, 1)
        self.position = nn.Parameter(torch.randn(1, GRID * GRID, dim) * 0.02)
        self.layers = nn.ModuleList(
            Layer(config, config.drop_path * i / max(1, config.depth - 1))
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        # Mean and deviation over tokens: how much a feature varies in a song says
        # as much about a genre as its average.
        self.pool = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(dim, config.classes)
        # Only for training: a classifier on the stem alone. It gets the stem to
        # useful features within the first epochs, and is left out of the export.
        self.stem_head = nn.Linear(config.stem[2], config.classes)

    def image(self, windows: Tensor) -> Tensor:
        """uint8 [n, 128, 128] -> normalised image [n, 1, 224, 224]."""
        x = windows.float().unsqueeze(1) * (1.0 / 255.0)
        x = F.interpolate(
            x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
        )
        return (x - self.config.mean) / self.config.std

    def features(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """-> (pooled features [n, dim], stem features [n, c, 14, 14])."""
        x = self.image(windows).contiguous(memory_format=torch.channels_last)
        stem = self.stem(x)
        tokens = self.to_tokens(stem).flatten(2).transpose(1, 2) + self.position
        if self.training and self.config.keep_tokens < 1.0:
            # Patches left out at random: cheaper, and no single place in the
            # picture can carry the answer.
            keep = int(GRID * GRID * self.config.keep_tokens)
            n = tokens.shape[0]
            order = torch.rand(n, GRID * GRID).argsort(dim=1)[:, :keep]
            index = order.unsqueeze(2).expand(-1, -1, tokens.shape[2])
            tokens = tokens.gather(1, index)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        mean = tokens.mean(dim=1)
        deviation = ((tokens - mean.unsqueeze(1)) ** 2).mean(dim=1).add(1e-5).sqrt()
        return self.pool(torch.cat([mean, deviation], dim=1)), stem

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        pooled, _ = self.features(windows)
        return self.head(F.gelu(pooled)), F.normalize(pooled, dim=1)

    def training_logits(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """-> (logits, logits of the stem's own classifier), both [n, classes]."""
        pooled, stem = self.features(windows)
        return (
            self.head(self.dropout(F.gelu(pooled))),
            self.stem_head(self.dropout(stem.mean(dim=(2, 3)))),
        )


def count_parameters(model: nn.Module, skip: Optional[str] = "stem_head") -> int:
    """Parameters that reach the exported graph."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if skip is None or not name.startswith(skip)
    )
