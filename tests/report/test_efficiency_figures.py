"""Figures of memory and throughput: valid files, the same each time, nothing taken for markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from kvbench.efficiency.request import TrialResult
from kvbench.efficiency.rows import EfficiencyRow, Setting, make_row
from kvbench.report.efficiency_figures import write_figures

GIB = 1 << 30


def a_row(method: str, batch: int, gib: float, **changes: Any) -> EfficiencyRow:
    fields: dict[str, Any] = {
        "model": "m", "model_label": "M", "revision": "random", "method": method, "label": method,
        "runner": "engine", "protocol": "exact_prefill", "dtype": "float16", "input_tokens": 600,
        "vision_tokens": 0, "output_tokens": 10, "fixed_batch": batch, "prefill_rows": 8,
        "seed": 0, "gpu": "v100", "gpu_label": "4 cards", "memory": "emulated",
        "memory_limit": 64 * GIB, "device": "H100", "code": "", "versions": {},
    }  # fmt: skip
    status = changes.pop("status", "ok")
    result = TrialResult(status, path="graph", peak_nvml=int(gib * GIB), total_s=2.0)
    told = {"machine": "", "command": "", "time": "2026-01-01"}
    return make_row(
        Setting(**(fields | changes)), result, batch=batch, out_of_memory_at=None, tries=1, **told
    )


def lines() -> list[EfficiencyRow]:
    grid = [a_row(name, batch, batch / bits) for name, bits in (("fp16", 1), ("akvq_vl", 4))
            for batch in (8, 16, 40)]  # fmt: skip
    return [*grid, a_row("akvq_vl", 200, 63, fixed_batch=None)]


def texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("text")]


def test_files_are_what_their_names_say(tmp_path: Path) -> None:
    paths = write_figures(tmp_path, lines())
    assert [path.name for path in paths] == [
        "figure9.svg", "figure9.png", "throughput.svg", "throughput.png",
    ]  # fmt: skip
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.size[0] >= 900
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_axes_have_units_and_the_limit_a_line(tmp_path: Path) -> None:
    write_figures(tmp_path, lines())
    memory, speed = (texts(tmp_path / f"{name}.svg") for name in ("figure9", "throughput"))
    assert {"batch (rows)", "peak memory (GiB)", "limit 64 GiB", "fp16", "akvq_vl"} <= set(memory)
    assert {"batch (rows)", "tokens/s, prompts included", "M, 4 cards (emulated)"} <= set(speed)
    assert "limit 64 GiB" not in speed
    write_figures(tmp_path, [a_row("fp16", 8, 8, memory_limit=None, memory="measured")])
    measured = texts(tmp_path / "figure9.svg")
    assert "M, 4 cards" in measured
    assert not any(text.startswith("limit") for text in measured)


def test_methods_differ_in_colour_and_marker(tmp_path: Path) -> None:
    write_figures(tmp_path, lines())
    svg = (tmp_path / "figure9.svg").read_text().lower()
    assert "#0072b2" in svg and "#d55e00" in svg


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_figures(tmp_path, lines())]
    again = [path.read_bytes() for path in write_figures(tmp_path, lines()[::-1])]
    assert first == again
    assert b"dc:date" not in first[0]


def test_labels_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = ["a<b>&c", "$x^2$ $", "_hidden", "two\nlines\x1b[2J"]
    rows = [a_row(f"m{index}", 8, index + 1, label=label) for index, label in enumerate(odd)]
    write_figures(tmp_path, rows)
    found = texts(tmp_path / "figure9.svg")
    assert {"a<b>&c", "$x^2$ $", "_hidden", "two lines [2J"} <= set(found)


def test_blocks_have_files_of_their_own(tmp_path: Path) -> None:
    rows = [a_row("fp16", 8, 8), a_row("fp16", 8, 8, input_tokens=4000, model="../up")]
    rows += [a_row("fp16", 8, 8, memory="modelled")]
    paths = write_figures(tmp_path, rows)
    assert len({path.name for path in paths}) == 12
    assert all(path.parent == tmp_path and path.exists() for path in paths)


@pytest.mark.parametrize("status", ["oom", "failed"])
def test_rows_without_figures_have_no_picture(tmp_path: Path, status: str) -> None:
    assert write_figures(tmp_path, [a_row("fp16", 0, 1, status=status)]) == []
