"""A Vision Transformer with the parts that an imported checkpoint needs.

One network of our own computes what torchvision's, timm's and Hugging Face's compute
(they differ in names and in the layer norm's epsilon), with attention written out,
because rollout needs its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from picture import Picture

@dataclass(frozen=True)
class VitConfig:
    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp: int
    qkv_bias: bool
    eps: float
    head: tuple[int, ...]
    """Widths from the CLS token to the logits; ReLU between them."""

    @property
    def grid(self) -> int:
        return self.image_size // self.patch


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: VitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.mlp)
        self.fc2 = nn.Linear(c.mlp, c.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [n, t, width] -> (tokens, attention [n, heads, t, t], rows sum to 1)."""
        _, places, width = x.shape
        size = width // self.heads
        q, k, v = (
            part.reshape(-1, places, self.heads, size).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attention = ((q * size**-0.5) @ k.transpose(2, 3)).softmax(dim=3)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(-1, places, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), attention


class VisionTransformer(nn.Module):
    """Pictures float32 [n, 3, size, size] -> logits, embedding, attention rollout."""

    def __init__(self, c: VitConfig) -> None:
        super().__init__()
        self.config = c
        self.patch = nn.Conv2d(3, c.width, c.patch, stride=c.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, c.width))
        self.position = nn.Parameter(torch.zeros(1, c.grid**2 + 1, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in zip(c.head, c.head[1:], strict=False))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> logits [n, classes]; embedding [n, width], the head's input at unit length;
        rollout [n, grid, grid] over patches, sums to 1, row 0 the picture's top."""
        x = self.patch(picture).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        layers: list[Tensor] = []
        for block in self.blocks:
            x, attention = block(x)
            layers.append(attention)
        seen = self.norm(x)[:, 0]
        logits = seen
        for i, layer in enumerate(self.head):
            logits = layer(F.relu(logits) if i else logits)
        return logits, F.normalize(seen, dim=1), self.rollout(layers)

    def rollout(self, layers: list[Tensor]) -> Tensor:
        """Attention rollout (Abnar & Zuidema 2020): how much of the last CLS token comes
        from each patch when every block passes on half attention, half itself.

        Only the CLS row of the product is needed, so it runs from the last block to the
        first as a row vector.
        """
        row = None
        for attention in reversed(layers):
            mean = attention.mean(dim=1)
            step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            step = step / step.sum(dim=2, keepdim=True)
            row = step[:, :1] if row is None else row @ step
        assert row is not None
        patches = row[:, 0, 1:]
        patches = patches / patches.sum(dim=1, keepdim=True)
        return patches.reshape(-1, self.config.grid, self.config.grid)


class ImportedNetwork(nn.Module):
    """What is exported: windows uint8 [n, bands, frames] -> logits [n, classes],
    embedding [n, width], attention [n, rows, columns] with row 0 the lowest in pitch."""

    def __init__(self, picture: Picture, vit: VisionTransformer) -> None:
        super().__init__()
        self.picture = picture
        self.vit = vit

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, embedding, rollout = self.vit(self.picture(windows))
        if self.picture.form.lowest == "bottom":
            rollout = rollout.flip(1)
        return logits, embedding, rollout
