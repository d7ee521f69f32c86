"""Figures: both files, the same to the byte each time, whatever the user's own settings."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest

from kvbench.report.figures import MARKERS, PALETTE, figure, files, legend_below, line_style


def draw(path: Path) -> list[bytes]:
    with figure(path, 1, 2, sharey=True) as (whole, axes):
        for index in range(3):
            axes[0].plot([1, 2, 3], [index, 2, index], label=f"line {index}", **line_style(index))
        axes[1].imshow([[1.0, 2.0], [3.0, 4.0]])
        axes[0].set(xlabel="time (s)")
        legend_below(whole, axes[0])
    return [file.read_bytes() for file in files([path])]


def test_the_same_each_time(tmp_path: Path) -> None:
    first = draw(tmp_path / "a.b")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        second = draw(tmp_path / "c")
    assert first == second
    assert (tmp_path / "a.b.svg").is_file()
    svg = first[0].decode()
    assert "time (s)" in svg  # text stays text
    assert "<dc:date>" not in svg
    assert first[1].startswith(b"\x89PNG")


def test_nothing_is_written_when_drawing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), figure(tmp_path / "a"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_two_lines_look_alike() -> None:
    assert len(PALETTE) == len(MARKERS)
    styles = {tuple(sorted(line_style(index).items())) for index in range(21)}
    assert len(styles) == 21
