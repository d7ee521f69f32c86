"""Cards to measure on or to stand in for, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.efficiency.nvml import visible_device
from kvbench.errors import UserError
from kvbench.specs import suggestion

AUTO = "auto"
_GIB = 1 << 30


@dataclass(frozen=True)
class GPUProfile:
    """A card, or several that hold one model together.

    Attributes:
        name: On the command line and in rows.
        label: In tables.
        memory: Bytes. Data sheets say GB where the driver counts GiB.
        bandwidth: Bytes a second of device memory; None where it isn't known.
        fp16_rate: FLOP/s of dense float16 products accumulated in float32; None: not known.
        device: Part of the name that the driver gives such a card.
    """

    name: str
    label: str
    memory: int
    bandwidth: float | None = None
    fp16_rate: float | None = None
    device: str = ""


# Sources: NVIDIA's data sheets "Tesla V100" (SXM2), "A100 Tensor Core GPU" (SXM), "H100 Tensor Core
# GPU" (SXM, half the rate given with sparsity), "H200 Tensor Core GPU" (SXM, likewise), and the
# white paper "NVIDIA Ada GPU Architecture", appendix A (GeForce RTX 4090). The H200's 141 GB are a
# little over 140 of the driver's GiB.
PROFILES: dict[str, GPUProfile] = {
    profile.name: profile
    for profile in (
        # AKVQ-VL's machine. Layers are spread over the cards, which work one after the other: their
        # memory adds up, their bandwidth and rate don't.
        GPUProfile("v100", "4 x V100 16 GB", 4 * 16 * _GIB, 0.9e12, 125e12),
        GPUProfile("a100_40", "A100 40 GB", 40 * _GIB, 1.555e12, 312e12, "A100-SXM4-40GB"),
        GPUProfile("a100_80", "A100 80 GB", 80 * _GIB, 2.039e12, 312e12, "A100-SXM4-80GB"),
        GPUProfile("h100", "H100 80 GB", 80 * _GIB, 3.35e12, 989.5e12, "H100 80GB HBM3"),
        GPUProfile("h200", "H200 141 GB", 140 * _GIB, 4.8e12, 989.5e12, "H200"),
        GPUProfile("rtx4090", "RTX 4090", 24 * _GIB, 1.008e12, 165.2e12, "RTX 4090"),
    )
}


@dataclass(frozen=True)
class Target:
    """A profile and how it can be had on this machine.

    Attributes:
        profile: The card that rows speak of.
        device: Name of this machine's card; None: there is none, or it has less memory.
        limit: Bytes to hold a process to; None: it is this machine's card, and has what it has.
    """

    profile: GPUProfile
    device: str | None
    limit: int | None


def choose_profile(name: str) -> Target:
    """Find a profile by name; "auto" is this machine's card.

    Raises:
        UserError: The name is unknown, or it is "auto" and there is no card.
    """
    card = visible_device()
    if name == AUTO:
        if card is None:
            raise UserError(f"there is no GPU here: name one, --gpu {', '.join(PROFILES)}")
        known = next((p for p in PROFILES.values() if p.device and p.device in card.name), None)
        found = (known.bandwidth, known.fp16_rate) if known else (None, None)
        return Target(GPUProfile(AUTO, card.name, card.memory, *found), card.name, None)
    if name not in PROFILES:
        known_names = suggestion(name, [*PROFILES, AUTO], "known are")
        raise UserError(f"unknown GPU {name!r}: {known_names}")
    profile = PROFILES[name]
    if card is not None and profile.device and profile.device in card.name:
        return Target(profile, card.name, None)
    if card is None or card.memory < profile.memory:
        return Target(profile, None, profile.memory)
    return Target(profile, card.name, profile.memory)
