"""minimile: a seeded generator of MileBench's twelve tasks, small enough for a tiny model."""

from __future__ import annotations

from kvbench.tasks.minimile.canvas import IMAGE_SIZE, Pixels
from kvbench.tasks.minimile.catalog import FOLDERS, INSTRUCTIONS, draw
from kvbench.tasks.minimile.drawing import Drawing
from kvbench.tasks.minimile.vocabulary import FACT_VOCABULARY
from kvbench.tasks.minimile.writer import (
    CALIBRATION_SEED,
    VERSION,
    cached_root,
    calibration_root,
    default_root,
    make,
    sample_rng,
)

__all__ = [
    "CALIBRATION_SEED",
    "FACT_VOCABULARY",
    "FOLDERS",
    "IMAGE_SIZE",
    "INSTRUCTIONS",
    "VERSION",
    "Drawing",
    "Pixels",
    "cached_root",
    "calibration_root",
    "default_root",
    "draw",
    "make",
    "sample_rng",
]
