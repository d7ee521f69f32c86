"""Rotary position embedding undone and done again, for methods that store keys before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.errors import UserError


def rotate_half(x: Tensor) -> Tensor:
    """(-x2, x1) of the two halves of the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class RotaryPositions:
    """Position ids of every cached column, shared by all layers; tables are computed on demand."""

    def __init__(self) -> None:
        """No positions yet."""
        self.module: Any = None
        self.ids: Tensor | None = None

    def append(self, module: Any, ids: Tensor) -> None:
        """New columns; ids is (B, n), or (3, B, n) for M-RoPE."""
        ids = (ids if ids.dim() == 3 else ids[None]).to(torch.int32)
        self.module = module
        if self.ids is not None:
            # One row may stand for all, and one axis for M-RoPE's three (text after images).
            axes, rows = (
                max(sizes) for sizes in zip(self.ids.shape[:2], ids.shape[:2], strict=True)
            )
            ids = torch.cat((self.ids.expand(axes, rows, -1), ids.expand(axes, rows, -1)), 2)
        self.ids = ids

    def select(self, rows: Tensor) -> None:
        """Keep rows by index, repeats allowed."""
        if self.ids is not None and self.ids.shape[1] > 1:
            self.ids = self.ids.index_select(1, rows.to(self.ids.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the position ids."""
        return 0 if self.ids is None else self.ids.numel() * self.ids.element_size()

    def row_nbytes(self, tokens: int) -> int:
        """Bytes of the position ids of a row that holds so many tokens, padding not counted."""
        return 0 if self.ids is None else self.ids.shape[0] * tokens * self.ids.element_size()

    def embed(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Keys (B, H, n, D) before RoPE to after; slots (B, n) are columns of the sequence."""
        cos, sin = self._tables(keys, slots)
        width, x = cos.shape[-1], keys.to(cos.dtype)
        turned = x[..., :width] * cos + rotate_half(x[..., :width]) * sin
        return torch.cat((turned, x[..., width:]), -1).to(keys.dtype)

    def strip(self, keys: Tensor, slots: Tensor) -> Tensor:
        """The inverse of `embed`; a scaling of cos and sin by a (YaRN) divides by a squared."""
        cos, sin = self._tables(keys, slots)
        width, x = cos.shape[-1], keys.to(cos.dtype)
        turned = x[..., :width] * cos - rotate_half(x[..., :width]) * sin
        turned = turned / (cos.square() + sin.square())
        return torch.cat((turned, x[..., width:]), -1).to(keys.dtype)

    def _tables(self, keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        if self.module is None or self.ids is None:
            raise UserError(
                "the positions of the keys are unknown; make the cache with "
                "kvbench.quantized_cache(model, ...) so that the model is observed."
            )
        rows = slots.shape[0]
        # The ids and the module may be on another device than this layer's keys.
        index = slots.to(self.ids.device).clamp_min(0).long()[None]
        index = index.expand(self.ids.shape[0], -1, -1)
        ids = self.ids.expand(-1, rows, -1).gather(2, index).long()
        like = torch.empty(0, dtype=torch.float32, device=ids.device)
        cos, sin = self.module.forward(like, ids if ids.shape[0] > 1 else ids[0])
        cos, sin = cos.to(keys.device), sin.to(keys.device)
        if cos.dim() == 4:
            cos, sin = self._merged(cos), self._merged(sin)
        wide = torch.promote_types(keys.dtype, torch.float32)
        return cos[:, None].to(wide), sin[:, None].to(wide)

    def _merged(self, table: Tensor) -> Tensor:
        """(3, B, n, D) M-RoPE tables to (B, n, D), for models that merge them in attention."""
        parameters = self.module.config.rope_parameters
        sections = list(parameters["mrope_section"]) * 2
        return torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, -1))], -1)
