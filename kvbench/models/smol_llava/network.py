"""The model as it is trained: a frozen language model plus low-rank factors, and a vision tower.

Every step adds scale * B @ A to the frozen matrices of all layers at once and then runs plain
layers, which on small widths is much faster than a side path for each factor (Hu et al., LoRA,
2021, gives the factorisation). Logits equal those of the merged `LlavaForConditionalGeneration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvbench.models.smol_llava.attention import Attention, padded
from kvbench.models.smol_llava.batches import Batch
from kvbench.models.smol_llava.layers import Functions, rms_norm
from kvbench.models.smol_llava.tower import Projector, Tower
from kvbench.models.smol_llava.weights import MATRICES

RANK = 40
SCALE = 2.0


class Factors(nn.Module):
    """Low-rank factors of all layers: a (layers, rank, in) and b (layers, out, rank), float32."""

    def __init__(self, matrices: dict[str, Tensor], rank: int = RANK, scale: float = SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, matrix in matrices.items():
            layers, rows, columns = matrix.shape
            self.a[name] = nn.Parameter(torch.randn(layers, rank, columns) * (3 * columns) ** -0.5)
            self.b[name] = nn.Parameter(torch.zeros(layers, rows, rank))

    def added_to(self, name: str, matrix: Tensor) -> Tensor:
        """Gives matrix + scale * b @ a for all layers, in the matrix's dtype."""
        a, b = self.a[name].to(matrix.dtype), self.b[name].to(matrix.dtype)
        return torch.baddbmm(matrix, b, a, alpha=self.scale)


@dataclass
class Language:
    """The frozen language model, layers stacked.

    Attributes:
        matrices: short name -> (layers, out, in).
        norms: input and post-attention norms, (layers, D) each.
        final_norm: (D,).
        embedding: (vocabulary, D), also the output matrix.
        kv_heads: heads of keys and values.
        epsilon: of the norms.
        theta: base of the rotary embedding.
    """

    matrices: dict[str, Tensor]
    norms: tuple[Tensor, Tensor]
    final_norm: Tensor
    embedding: Tensor
    kv_heads: int
    epsilon: float
    theta: float

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> Language:
        """The weights of a `LlamaForCausalLM` with tied embeddings, copied to `dtype`."""
        state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
        config = model.config
        if config.head_dim != 64 or not config.tie_word_embeddings:
            raise ValueError("the trainer needs heads of 64 channels and tied embeddings")

        def stacked(name: str) -> Tensor:
            layers = range(config.num_hidden_layers)
            return torch.stack([state[f"model.layers.{layer}.{name}.weight"] for layer in layers])

        return cls(
            {short: stacked(name) for short, name in MATRICES.items()},
            (stacked("input_layernorm"), stacked("post_attention_layernorm")),
            state["model.norm.weight"],
            state["model.embed_tokens.weight"],
            config.num_key_value_heads,
            config.rms_norm_eps,
            config.rope_parameters["rope_theta"],
        )

    def to(self, device: torch.device) -> Language:
        """The same on another device."""
        return Language(
            {name: matrix.to(device) for name, matrix in self.matrices.items()},
            (self.norms[0].to(device), self.norms[1].to(device)),
            self.final_norm.to(device),
            self.embedding.to(device),
            self.kv_heads,
            self.epsilon,
            self.theta,
        )

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (N, 64), float32, of LLaMA's rotary embedding."""
        steps = torch.arange(0, 64, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None].float() * self.theta ** -(steps / 64)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


class Network(nn.Module):
    """Tower, projector and factors (trained) around a language model (frozen).

    Attributes:
        functions: the layers, compiled or not.
        attention: how sequences laid end to end attend to themselves.
    """

    def __init__(self, language: Language, rank: int = RANK, scale: float = SCALE) -> None:
        super().__init__()
        self.language = language
        self.tower = Tower()
        self.projector = Projector(language.embedding.shape[1])
        self.factors = Factors(language.matrices, rank, scale)
        self.functions = Functions()
        self.attention: Attention = padded

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products and of the language model's residual stream."""
        return self.language.embedding.dtype

    def layer_weights(self) -> list[tuple[Tensor, ...]]:
        """For each layer: input norm, qkv, output, post-attention norm, gate and up, down."""
        full = {
            name: self.factors.added_to(name, matrix)
            for name, matrix in self.language.matrices.items()
        }
        stacks = (
            self.language.norms[0],
            torch.cat([full["q"], full["k"], full["v"]], 1),
            full["o"],
            self.language.norms[1],
            torch.cat([full["gate"], full["up"]], 1),
            full["down"],
        )
        return list(zip(*(stack.unbind(0) for stack in stacks), strict=True))

    def image_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tower output (V, 64, 256), float32, and projected tokens (V, 64, D)."""
        tokens = self.tower(pixels, self.dtype, self.functions.vision)
        return tokens, self.projector(tokens.to(self.dtype))

    def hidden(self, batch: Batch, features: Tensor) -> Tensor:
        """Residual stream (N, D) after the last layer."""
        x = F.embedding(batch.ids, self.language.embedding)
        real = features.flatten(0, 1)[: batch.image_tokens.shape[0]].to(x.dtype)
        x = x.index_put((batch.image_tokens,), real)
        cos, sin = self.language.rotary(batch.positions)
        for weights in self.layer_weights():
            if self.functions.recompute:
                x = checkpoint(self._layer, x, cos, sin, batch, *weights, use_reentrant=False)
            else:
                x = self._layer(x, cos, sin, batch, *weights)
        return x

    def _layer(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, *weights: Tensor) -> Tensor:
        norm_in, qkv, out, norm_mlp, gate_up, down = weights
        kv_heads, epsilon = self.language.kv_heads, self.language.epsilon
        query, key, value = self.functions.before(x, norm_in, qkv, cos, sin, kv_heads, epsilon)
        mixed = self.attention(query, key, value, batch.bounds, batch.longest)
        after: Tensor = self.functions.after(x, mixed, out, norm_mlp, gate_up, down, epsilon)
        return after

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (K, vocabulary), float32, of residual stream rows (K, D)."""
        x = rms_norm(hidden, self.language.final_norm, self.language.epsilon)
        return F.linear(x, self.language.embedding).float()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (K, vocabulary) at the batch's sources, and the tower's output."""
        tokens, features = self.image_features(batch.pixels)
        return self.logits(self.hidden(batch, features)[batch.sources]), tokens
