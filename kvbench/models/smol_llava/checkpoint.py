"""Training state on disk: everything for the same machine, and small parts that travel.

A full state holds float32 weights and the optimizer's moments. Parts hold bfloat16 weights in files
of at most 15 MiB; training continued from them starts with fresh moments.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvbench.errors import UserError

FULL = "state.safetensors"
PARTS = "part-*.safetensors"
PART_BYTES = 15 * 2**20


@dataclass
class Progress:
    """How far joint training has come, over all runs.

    Attributes:
        seconds: of joint training.
        steps: of the optimizer.
        samples: sequences seen.
    """

    seconds: float = 0.0
    steps: int = 0
    samples: int = 0


def save_full(
    folder: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Writes weights and moments, replacing an earlier state only when complete."""
    tensors = {f"weights.{name}": x for name, x in modules.state_dict().items()}
    for name, parameter in modules.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"moments.{name}.{key}"] = torch.as_tensor(value)
    _write(tensors, folder / FULL, progress)


def save_parts(folder: Path, modules: nn.Module, progress: Progress) -> list[Path]:
    """Writes bfloat16 weights in files of at most `PART_BYTES`."""
    parts: list[dict[str, Tensor]] = [{}]
    room = PART_BYTES
    for name, x in modules.state_dict().items():
        small = x.to("cpu", torch.bfloat16)
        if small.nbytes > room:
            parts.append({})
            room = PART_BYTES
        parts[-1][f"weights.{name}"] = small
        room -= small.nbytes
    paths = [folder / PARTS.replace("*", str(number)) for number in range(1, len(parts) + 1)]
    for part, path in zip(parts, paths, strict=True):
        _write(part, path, progress)
    return paths


def _write(tensors: dict[str, Tensor], path: Path, progress: Progress) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    whole = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    save_file(whole, unfinished, {"progress": json.dumps(asdict(progress))})
    unfinished.replace(path)


def read(folder: Path) -> tuple[dict[str, Tensor], Progress]:
    """Tensors and progress of a full state or, without one, of parts.

    Raises:
        UserError: the folder holds neither.
    """
    from safetensors import safe_open

    full = folder / FULL
    paths = [full] if full.is_file() else sorted(folder.glob(PARTS))
    if not paths:
        raise UserError(f"{folder} holds neither {FULL} nor {PARTS}; name the folder of a run")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(file.metadata()["progress"]))
    return tensors, progress


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands below `prefix`, without it."""
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def restore_weights(modules: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a state's weights into modules.

    Raises:
        UserError: they don't fit.
    """
    try:
        modules.load_state_dict(below(tensors, "weights."))
    except RuntimeError as error:
        raise UserError(
            f"the training state does not fit these sizes ({error}); "
            "continue with the options of the run that wrote it"
        ) from error


def restore_moments(
    modules: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> bool:
    """Puts a full state's moments into the optimizer; False if there are none."""
    found = below(tensors, "moments.")
    for name, parameter in modules.named_parameters():
        own = below(found, f"{name}.")
        if own:
            optimizer.state[parameter] = {
                key: x if key == "step" and not _fused(optimizer) else x.to(parameter.device)
                for key, x in own.items()
            }
    return bool(found)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)
