"""The shipped weights: tower, projector and factors in one bfloat16 safetensors file.

Names: `vision_tower.*` and `multi_modal_projector.*` as transformers has them; `factors.a.NAME`
(layers, rank, in) and `factors.b.NAME` (layers, out, rank) for the seven matrices of a layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from kvbench.models.smol_llava.network import Factors
    from kvbench.models.smol_llava.tower import Tower

WEIGHTS = Path(__file__).with_name("weights.safetensors")
MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Short names of a decoder layer's matrices, and transformers' names."""


def exported(tower: Tower, projector: nn.Module, factors: Factors) -> dict[str, Tensor]:
    """Trained parts under the names of the shipped file, in their own dtype."""
    state = {f"vision_tower.{name}": x for name, x in tower.exported().items()}
    for prefix, part in {"multi_modal_projector": projector, "factors": factors}.items():
        state |= {f"{prefix}.{name}": x.detach() for name, x in part.state_dict().items()}
    return state


def save(state: dict[str, Tensor], path: Path, scale: float, **notes: str) -> None:
    """Writes weights of `exported` as bfloat16, with the factors' scale and notes as metadata."""
    from safetensors.torch import save_file

    shipped = {name: x.to("cpu", torch.bfloat16).contiguous().clone() for name, x in state.items()}
    save_file(shipped, path, {"scale": repr(scale), **notes})
    path.chmod(0o644)  # package data; safetensors makes files for their owner alone


def read(path: Path = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Shipped weights and their metadata.

    Raises:
        UserError: the file is missing or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(
            f"the weights of smol_llava are missing at {path}; reinstall kvbench, or train them "
            "with: python -m kvbench.models.smol_llava.train --help"
        )
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = dict(file.metadata() or {})
        notes["scale"] = json.loads(notes["scale"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} does not hold the weights of smol_llava ({error}); reinstall kvbench"
        ) from error
    return state, notes


def merge(model: Any, state: dict[str, Tensor], scale: float) -> None:
    """Puts shipped weights into a `LlavaForConditionalGeneration` with SmolLM2's weights, in place.

    Args:
        model: on the CPU; its language model is the unchanged SmolLM2.
        state: of `read` or `exported`.
        scale: of the factors' product.

    Raises:
        UserError: the weights don't fit the model.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # where some transformers releases nest it
    projector = model.model.multi_modal_projector
    try:
        _fill(tower, state, "vision_tower.", unused="post_layernorm")
        _fill(projector, state, "multi_modal_projector.")
        for number, layer in enumerate(model.model.language_model.layers):
            for short, name in MATRICES.items():
                a, b = (state[f"factors.{side}.{short}"][number].float() for side in "ab")
                weight = layer.get_submodule(name).weight
                weight.data = (weight.data.float() + scale * b @ a).to(weight.dtype)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the weights of smol_llava do not fit its architecture ({error}); reinstall kvbench"
        ) from error


def _fill(part: Any, state: dict[str, Tensor], prefix: str, unused: str = "") -> None:
    """Loads everything below `prefix` into a module; only what begins with `unused` may miss."""
    own = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
    outcome = part.load_state_dict(own, strict=False)
    missing = [k for k in outcome.missing_keys if not (unused and k.startswith(unused))]
    if missing or outcome.unexpected_keys:
        raise RuntimeError(f"missing {missing}, unexpected {outcome.unexpected_keys}")
