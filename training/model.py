"""The network: a Vision Transformer of 14 x 14 patches behind a convolutional stem.

A plain ViT cuts patches with one linear map and has to learn locality from data;
with fewer than 5,000 clips it does not. A small residual stem gives the patches
their local features, and the transformer relates them over time and frequency.

Four more tokens carry statistics of the whole window: how the cepstrum (the shape
of the spectrum) is spread and correlated over time. Attention can express such
second-order figures only clumsily, and they are what classical genre recognition
rests on. They are computed inside the graph, from the same uint8 window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prepare

IMAGE_SIZE = 224
GRID = 14


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape."""

    classes: int = 15
    tags: int = 0
    dim: int = 192
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 3.0
    stem: tuple[int, int, int] = (48, 96, 160)
    blocks: tuple[int, int, int] = (1, 2, 2)
    drop_path: float = 0.1
    dropout: float = 0.2
    keep_tokens: float = 0.6
    statistic_tokens: int = 4
    statistic_width: int = 384
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
    """Image [n, 2, 224, 224] -> features [n, c, 14, 14]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        a, b, c = config.stem
        # The image was enlarged 1.75 times from 128 x 128: a stride of 4 (2.3
        # cells) after 7 x 7 taps loses little and keeps the costly sizes small.
        self.entry = nn.Sequential(
            nn.Conv2d(2, a, 7, 4, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU()
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

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention written out: every exporter and provider has it, and at 118
        tokens its backward pass is faster on a CPU than the fused kernel's.

        Second comes who looks at whom: [n, heads, tokens, tokens], rows sum to 1.
        """
        n, t, dim = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        y = weights @ v
        return self.out(y.transpose(1, 2).reshape(n, t, dim)), weights

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: leaves a branch out for some samples while training."""
        if not self.training or self.drop_path == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1.0 - self.drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, t, dim] -> tokens, and the layer's attention."""
        mixed, weights = self.attention(self.norm1(x))
        x = x + self._drop(mixed)
        return x + self._drop(self.mlp(self.norm2(x))), weights


class CommonForm(nn.Module):
    """The service's windows uint8 [n, 128, 128] -> the form the network was trained
    on, float32 [n, 128, 128] in 0..1: smeared over rows, re-referenced to the loudest
    cell. See prepare.to_fma_bands for why."""

    def __init__(self) -> None:
        super().__init__()
        bands = torch.from_numpy(prepare.to_fma_bands())
        rows = torch.from_numpy(prepare.fma_row_weights())
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        span = -prepare.FLOOR_DB
        to_nepers = float(np.log(10) / 10)
        power = torch.exp((windows.float() / 255.0 - 1.0) * (span * to_nepers))
        smeared = torch.matmul(self.bands, power).log() * (1.0 / to_nepers)
        db = torch.matmul(self.rows, smeared)
        db = db - db.amax(dim=2, keepdim=True).amax(dim=1, keepdim=True)
        return (db / span + 1.0).clamp(0.0, 1.0)


class WindowStatistics(nn.Module):
    """Fixed statistics of windows: float32 [n, 128, 128] in 0..1 -> [n, size].

    Cepstra are the DCT over mel bands: 30 coefficients for each of 128 columns.
    Nothing here is learned; the values are standardised by a batch norm behind it.
    """

    CEPSTRA = 30
    CORRELATED = 24
    MODULATED = 20

    def __init__(self) -> None:
        super().__init__()
        k, m = np.arange(self.CEPSTRA)[:, None], np.arange(128)[None, :]
        dct = np.sqrt(2 / 128) * np.cos(np.pi * k * (2 * m + 1) / 256)
        dct[0] /= np.sqrt(2)
        turn = 2 * np.pi * np.arange(1, 65)[None, :] * np.arange(128)[:, None] / 128
        groups = np.kron(np.eye(32), np.full((1, 4), 0.25))
        pairs = np.triu_indices(self.CORRELATED, 1)
        # Constants are not saved with the weights: they are these formulas.
        for name, value in (
            ("dct", dct), ("cosines", np.cos(turn)), ("sines", np.sin(turn)), ("groups", groups),
        ):
            tensor = torch.from_numpy(value.astype(np.float32))
            self.register_buffer(name, tensor, persistent=False)
        flat = torch.from_numpy(pairs[0] * self.CORRELATED + pairs[1])
        self.register_buffer("pairs", flat, persistent=False)
        self.size = 4 * self.CEPSTRA + len(pairs[0]) + 5 * 32 + 127 + 8 * self.MODULATED

    @staticmethod
    def _deviation(x: Tensor) -> Tensor:
        """Standard deviation over the last axis; ``x`` has zero mean there."""
        return (x * x).mean(dim=2).add(1e-6).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 25.5
        cepstra = torch.matmul(self.dct, x)
        average = cepstra.mean(dim=2)
        centred = cepstra - average.unsqueeze(2)
        spread = self._deviation(centred)
        step = cepstra[:, :, 1:] - cepstra[:, :, :-1]
        step_spread = self._deviation(step - step.mean(dim=2, keepdim=True))
        standard = centred / (spread.unsqueeze(2) + 1e-2)
        skew = (standard**3).mean(dim=2).clamp(-10, 10)
        some = standard[:, : self.CORRELATED]
        correlation = torch.matmul(some, some.transpose(1, 2)) / 128
        bands = torch.matmul(self.groups, x)
        band_average = bands.mean(dim=2)
        band_spread = self._deviation(bands - band_average.unsqueeze(2))
        band_step = torch.matmul(self.groups, (x[:, :, 1:] - x[:, :, :-1]).abs().mean(dim=2, keepdim=True))
        band_top = x.amax(dim=2).reshape(-1, 32, 4).amax(dim=2)
        silent = (1.0 - x).clamp(min=0.0).mean(dim=2, keepdim=True)
        band_silent = torch.matmul(self.groups, silent).flatten(1)
        row_step = (x[:, 1:] - x[:, :-1]).abs().mean(dim=2)
        moved = centred[:, : self.MODULATED]
        real, imaginary = torch.matmul(moved, self.cosines), torch.matmul(moved, self.sines)
        magnitude = (real * real + imaginary * imaginary).add(1e-6).sqrt()
        modulation = magnitude.reshape(-1, self.MODULATED, 8, 8).mean(dim=3).add(1.0).log()
        return torch.cat(
            [
                average, spread, step_spread, skew,
                correlation.flatten(1).index_select(1, self.pairs),
                band_average, band_spread, band_step.flatten(1), band_top, band_silent,
                row_step,
                modulation.flatten(1),
            ],
            dim=1,
        )


@dataclass(frozen=True)
class Features:
    """``pooled`` [n, dim]; ``stem`` [n, c, 14, 14]; ``measured``: the window's statistics
    [n, size], ``statistics``: features of them [n, width]; ``attention``: per layer
    [n, heads, tokens, tokens]."""

    pooled: Tensor
    stem: Tensor
    measured: Tensor
    statistics: Tensor
    attention: list[Tensor]


def roll_out(attention: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928):
    per layer [n, heads, tokens, tokens] -> [n, 14, 14], what share of all that the last
    layer's tokens read goes back to each patch; sums to 1.

    Half of each layer is its shortcut. The answer reads the mean over all tokens, so the
    mean row is taken. The tokens of statistics belong to no place and are left out.
    """
    n, _, tokens, _ = attention[0].shape
    read = torch.full((n, 1, tokens), 1.0 / tokens, device=attention[0].device)
    for weights in reversed(attention):
        read = 0.5 * read + 0.5 * torch.matmul(read, weights.float().mean(dim=1))
    patches = read[:, 0, : GRID * GRID]
    return (patches / patches.sum(dim=1, keepdim=True)).reshape(n, GRID, GRID)


class GenreViT(nn.Module):
    """windows uint8 [n, 128, 128] -> (logits [n, classes], embedding [n, dim],
    attention [n, 14, 14])."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.common = CommonForm()
        self.stem = Stem(config)
        self.to_tokens = nn.Conv2d(config.stem[2], dim, 1)
        self.position = nn.Parameter(torch.randn(1, GRID * GRID, dim) * 0.02)
        self.layers = nn.ModuleList(
            Layer(config, config.drop_path * i / max(1, config.depth - 1))
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.statistics = WindowStatistics()
        width = config.statistic_width
        self.statistics_norm = nn.BatchNorm1d(self.statistics.size, affine=False)
        self.statistics_hidden = nn.Sequential(
            nn.Linear(self.statistics.size, width), nn.BatchNorm1d(width), nn.GELU()
        )
        self.statistics_tokens = nn.Linear(width, config.statistic_tokens * dim)
        # Mean and deviation over tokens: how much a feature varies in a song says
        # as much about a genre as its average.
        self.pool = nn.Linear(2 * dim + width, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(dim, config.classes)
        # Only for training: names FMA's tags (labels.TAGS) from the same features.
        self.tag_head = nn.Linear(dim, config.tags) if config.tags else None
        # Only for training: classifiers on the stem and on the statistics alone.
        # They get both to useful features within the first epochs, whatever the
        # other does, and are left out of the export.
        self.stem_head = nn.Linear(config.stem[2], config.classes)
        self.statistics_head = nn.Linear(width, config.classes)

    def image(self, x: Tensor) -> Tensor:
        """float32 [n, 128, 128] in 0..1 -> normalised image [n, 2, 224, 224].

        The second channel is the window less each row's mean over time: what
        happens, without the room, the master and the codec it happened in.
        """
        channels = torch.stack(
            [(x - self.config.mean) / self.config.std,
             (x - x.mean(dim=2, keepdim=True)) / (0.5 * self.config.std)], dim=1,
        )
        return F.interpolate(
            channels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
        )

    def measure(self, x: Tensor) -> Tensor:
        """float32 [n, 128, 128] in 0..1 -> its statistics [n, size]."""
        # No gradient reaches below the window, and bfloat16 is too coarse for
        # differences of squares.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.statistics(x.float())

    def summary(self, measured: Tensor) -> Tensor:
        """Statistics [n, size] -> features of them [n, width]."""
        values = self.statistics_norm(measured).clamp(-4.0, 4.0)
        if self.training:
            values = F.dropout(values, self.config.dropout)
        return self.statistics_hidden(values)

    def features(self, x: Tensor) -> "Features":
        """float32 [n, 128, 128] in 0..1, common form -> what the heads read."""
        image = self.image(x).contiguous(memory_format=torch.channels_last)
        stem = self.stem(image)
        tokens = self.to_tokens(stem).flatten(2).transpose(1, 2) + self.position
        if self.training and self.config.keep_tokens < 1.0:
            # Patches left out at random: cheaper, and no single place in the
            # picture can carry the answer.
            keep = int(GRID * GRID * self.config.keep_tokens)
            n = tokens.shape[0]
            order = torch.rand(n, GRID * GRID, device=x.device).argsort(dim=1)[:, :keep]
            index = order.unsqueeze(2).expand(-1, -1, tokens.shape[2])
            tokens = tokens.gather(1, index)
        measured = self.measure(x)
        summary = self.summary(measured)
        if self.training:
            # Left out for some windows, or the patches would have nothing to learn.
            keep_summary = (torch.rand(summary.shape[0], 1, device=x.device) >= self.config.drop_path).float()
            used = summary * keep_summary
        else:
            used = summary
        extra = self.statistics_tokens(used).reshape(-1, self.config.statistic_tokens, self.config.dim)
        tokens = torch.cat([tokens, extra.to(tokens.dtype)], dim=1)
        attention = []
        for layer in self.layers:
            tokens, weights = layer(tokens)
            attention.append(weights)
        tokens = self.norm(tokens)
        mean = tokens.mean(dim=1)
        deviation = ((tokens - mean.unsqueeze(1)) ** 2).mean(dim=1).add(1e-5).sqrt()
        pooled = self.pool(torch.cat([mean, deviation, used], dim=1))
        return Features(pooled, stem, measured, summary, attention)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exported graph: windows as the service makes them, uint8 [n, 128, 128] ->
        logits [n, classes], embedding [n, dim] of unit length, attention [n, 14, 14]."""
        found = self.features(self.common(windows))
        logits = self.head(F.gelu(found.pooled))
        return logits, F.normalize(found.pooled, dim=1), roll_out(found.attention)

    def prepared_logits(self, windows: Tensor) -> Tensor:
        """Logits [n, classes] of windows uint8 that prepare.py made: they are in the
        common form already."""
        return self.head(F.gelu(self.features(windows.float() / 255.0).pooled))

    def training_logits(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prepared windows -> logits of the network, of the stem alone and of the
        statistics alone, each [n, classes], and of the tags [n, tags]."""
        found = self.features(windows.float() / 255.0)
        features = self.dropout(F.gelu(found.pooled))
        tags = features[:, :0] if self.tag_head is None else self.tag_head(features)
        return (
            self.head(features),
            self.stem_head(self.dropout(found.stem.mean(dim=(2, 3)))),
            self.statistics_head(self.dropout(found.statistics)),
            tags,
        )


def load_network(run: Path) -> GenreViT:
    """The network that train.py saved in ``run``, ready to answer."""
    saved = torch.load(run / "model.pt", weights_only=True)
    model = GenreViT(ModelConfig.from_dict(saved["config"]))
    model.load_state_dict(saved["state"])
    return model.eval()


def count_parameters(model: nn.Module) -> int:
    """Parameters that reach the exported graph."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(("stem_head", "statistics_head", "tag_head"))
    )
