"""Vision tower and projector in training form, with transformers' names at the border."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbench.models.smol_llava.architecture import IMAGE_SIZE, PATCH
from kvbench.models.smol_llava.layers import vision_layer

WIDTH = 256
LAYERS = 6
SIDE = IMAGE_SIZE // PATCH


def grid_waves(width: int = WIDTH, side: int = SIDE) -> Tensor:
    """Sines and cosines of rows and columns (side * side, width), a start for positions."""
    rates = 0.01 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


class TowerLayer(nn.Module):
    """Weights of one encoder layer; query, key and value in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


def _weights(layer: Any) -> tuple[Tensor, ...]:
    """A layer's weights and biases in the order that `vision_layer` takes them."""
    parts = (layer.norm1, layer.qkv, layer.out, layer.norm2, layer.up, layer.down)
    return tuple(x for part in parts for x in (part.weight, part.bias))


class Tower(nn.Module):
    """Patches, positions and encoder layers; no final norm, as LLaVA reads the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.5 * grid_waves())
        self.layers = nn.ModuleList(TowerLayer() for _ in range(LAYERS))

    def forward(
        self, pixels: Tensor, dtype: torch.dtype, layer: Callable[..., Any] = vision_layer
    ) -> Tensor:
        """Image tokens (V, 64, 256), float32, of uint8 pixels (V, 64, 64, 3)."""
        x = (pixels.float() / 127.5 - 1).to(dtype)
        x = x.view(-1, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(-1, SIDE * SIDE, 3 * PATCH * PATCH)  # a patch as the convolution sees it
        x = F.linear(x, self.patches.weight.to(dtype), self.patches.bias.to(dtype)).float()
        x = x + self.positions
        for part in self.layers:
            x = layer(x, _weights(part), dtype)
        return x

    def exported(self) -> dict[str, Tensor]:
        """The weights under transformers' names for `SiglipVisionModel`."""
        state = {
            "embeddings.patch_embedding.weight": self.patches.weight.view(WIDTH, 3, PATCH, PATCH),
            "embeddings.patch_embedding.bias": self.patches.bias,
            "embeddings.position_embedding.weight": self.positions,
        }
        for number, layer in enumerate(self.layers):
            for name, part in _parts(layer):
                state[f"encoder.layers.{number}.{name}.weight"] = part[0]
                state[f"encoder.layers.{number}.{name}.bias"] = part[1]
        return {name: tensor.detach() for name, tensor in state.items()}


def _parts(layer: Any) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Transformers' names of a layer's parts with weight and bias."""
    whole = zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [
        *zip(names, whole, strict=True),
        ("self_attn.out_proj", (layer.out.weight, layer.out.bias)),
        ("layer_norm1", (layer.norm1.weight, layer.norm1.bias)),
        ("layer_norm2", (layer.norm2.weight, layer.norm2.bias)),
        ("mlp.fc1", (layer.up.weight, layer.up.bias)),
        ("mlp.fc2", (layer.down.weight, layer.down.bias)),
    ]


class Projector(nn.Module):
    """LLaVA's projector: two matrices with an exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(WIDTH, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., 256) to the language model's width, in x's dtype."""
        for step, part in enumerate((self.linear_1, self.linear_2)):
            x = F.gelu(x) if step else x
            x = F.linear(x, part.weight.to(x.dtype), part.bias.to(x.dtype))
        return x
