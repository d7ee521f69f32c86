"""Many samples in one process: memory stays what it was. KVBENCH_SOAK says how many."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from scipy.stats import linregress

SAMPLES = int(os.environ.get("KVBENCH_SOAK", "240"))
METHODS = "fp16,rtn_int2,akvq_vl[recent=8]"
SCRIPT = Path(__file__).with_name("soak.py")
BLOCKS = 20
FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Memory that is freed goes back at once: what is measured is held, not holes between tensors."""
ALLOWED = 4096.0
"""Bytes a sample that may stay: the keys of its rows, of which there are three."""


def write_data(root: Path) -> None:
    """One task whose samples differ in text, length and number of images."""
    images, rng = root / "TQA" / "images", random.Random(0)
    images.mkdir(parents=True)
    for number in range(8):
        Image.effect_noise((48, 40), 80).convert("RGB").save(images / f"{number}.png")
    data = []
    for number in range(SAMPLES):
        names = [f"{rng.randrange(8)}.png" for _ in range(rng.randrange(1, 5))]
        places = "".join(f"{{image#{k}}}" for k in range(1, len(names) + 1))
        instance = {
            "context": places + "".join(rng.choices("abcdefgh ", k=rng.randrange(5, 120))),
            "images_path": names,
            "choice_list": ["red", "green"],
        }
        entry = {"sample_id": number, "task_instruction_id": 0, "image_quantity_level": "Few"}
        data.append(entry | {"task_instance": instance, "response": "green"})
    meta = {"question_type": "multi-choice", "task_instruction": ["Choose."]}
    content = json.dumps({"meta_data": meta, "data": data})
    (root / "TQA" / "TQA.json").write_text(content)


def slope(resident: list[int]) -> tuple[float, float]:
    """Bytes a sample and their standard error, after the first quarter.

    Taken of means over blocks: what one sample holds says little beyond what the one before did.
    """
    settled = resident[len(resident) // 4 :]
    size = len(settled) // BLOCKS
    means = [fmean(settled[start : start + size]) for start in range(0, size * BLOCKS, size)]
    fit = linregress([size * place for place in range(BLOCKS)], means)
    return float(fit.slope), float(fit.stderr)


@pytest.mark.slow
def test_memory_does_not_grow_with_samples(tiny_llava_folder: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    words = [tiny_llava_folder, tmp_path / "data", tmp_path / "out", METHODS]
    environment = os.environ | FIXED | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    resident = json.loads((tmp_path / "out" / "resident.json").read_text())
    assert len(resident) == SAMPLES
    growth, error = slope(resident)
    print(f"{SAMPLES} samples: {growth:.0f} +- {error:.0f} bytes a sample, {resident[-1]:,} held")
    assert growth - 3 * error < ALLOWED


def test_a_leak_shows() -> None:
    rng = random.Random(0)
    noise = [10**9 + rng.randrange(10**6) for _ in range(SAMPLES)]
    growth, error = slope([held + 20_000 * number for number, held in enumerate(noise)])
    assert growth - 3 * error > ALLOWED
    growth, error = slope(noise)
    assert growth - 3 * error < ALLOWED
