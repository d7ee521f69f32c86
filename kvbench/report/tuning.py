"""A search's Pareto front as CSV, Markdown and a figure, from the files of `kvbench tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench.evaluation.files import write_atomically
from kvbench.report.analysis import layer_ranges
from kvbench.report.board import Leaderboard
from kvbench.report.columns import Columns, read_columns
from kvbench.report.documents import read_document
from kvbench.report.figures import MARKERS, PALETTE, figure, files, legend_below
from kvbench.report.text import code, csv_text, markdown_table

_TEXT = """\
Layers of one cluster share a choice; tried are those that no other choice beats in bits and in
error in one of the layers. Error: relative error of a layer's attention output with the choice in
that layer only, mean over the cluster's layers and the prompts. KL(fp16 || method) in nats over the
answers' tokens, and accuracy, both on the prompts of the search: evaluate the preset on other data.
"""


def write_tuning(folder: Path) -> list[Path]:
    """Write ``front.csv``, ``front.md`` and the figure of a search's folder.

    Returns:
        These and the files that the search wrote.

    Raises:
        UserError: a file of the search is missing or broken, or the folder can't be written to.
    """
    found = read_document(folder / "tune.json", "tune")
    trials = read_columns(folder / "trials.csv", "tune")
    front = _front(trials)
    names = list(front.lines[0])[:-1]
    lines = [[line[name] for name in names] for line in front.lines]
    write_atomically(folder / "front.csv", csv_text(names, lines))
    write_atomically(folder / "front.md", _markdown(folder, found, trials))
    drawn = _draw(folder, found, trials)
    made = ("preset.json", "front.csv", "front.md", "trials.csv", "sensitivity.csv")
    return [*(folder / name for name in made), *files([drawn])]


def tuning_summary(folder: Path) -> str:
    """The front and how to use the best of it, as text.

    Raises:
        UserError: as `write_tuning`.
    """
    found = read_document(folder / "tune.json", "tune")
    front = _front(read_columns(folder / "trials.csv", "tune"))
    head = f"{found['label']}, budget {found['budget']:.3f} bits an element:"
    return "\n".join([head, _table(front), "", f"to use it: {_use(folder, found)}"])


def _front(trials: Columns) -> Columns:
    """The tables that no other beats, the smallest first."""
    front = trials.where("front", "true")
    return Columns(sorted(front.lines, key=lambda line: float(line["bits"])))


def _use(folder: Path, found: dict[str, Any]) -> str:
    name = found["identity"]["method"].partition("[")[0]
    return f'kvbench eval --methods "fp16,{name}[preset={folder / "preset.json"}]"'


def _table(front: Columns) -> str:
    lines = [
        [
            line["method"],
            f"{float(line['bits']):.3f}",
            f"{int(line['cache_bytes']):,}",
            f"{float(line['kl_mean']):.3g}",
            f"{100 * float(line['accuracy']):.1f}",
        ]
        for line in front.lines
    ]
    return markdown_table(["Method", "Bits", "Cache bytes", "KL", "Accuracy"], lines, 1)


def _markdown(folder: Path, found: dict[str, Any], trials: Columns) -> str:
    identity = found["identity"]
    head = (
        f"# {found['label']}: {identity['method']} tuned to {found['budget']:.3f} bits\n\n"
        f"{len(trials.lines)} tables on {found['prompts']} prompts of {identity['dataset']}, "
        f"{identity['protocol']}, {identity['dtype']}; FP16 answers "
        f"{100 * found['accuracy_fp16']:.1f} % of them right. Objective: {identity['objective']}. "
        f"Made by {code(found['command'])} on {Leaderboard((), found).machine}; kvbench "
        f"{found['version']}. To use it: {code(_use(folder, found))}."
    )
    parts = [head, "## Pareto front", _table(_front(trials))]
    parts += ["## Clusters", _TEXT, _clusters(folder, found)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _clusters(folder: Path, found: dict[str, Any]) -> str:
    table = read_columns(folder / "sensitivity.csv", "tune")
    choices = table.distinct("choice")
    lines = []
    for index, cluster in enumerate(found["clusters"]):
        mine = table.where("cluster", str(index))
        errors = [f"{mine.where('choice', choice)['error'].mean():.3f}" for choice in choices]
        lines.append([layer_ranges(cluster["layers"]), ", ".join(cluster["choices"]), *errors])
    return markdown_table(["Layers", "Tried", *choices], lines, 2)


def _draw(folder: Path, found: dict[str, Any], trials: Columns) -> Path:
    """Loss by bits of every table; the front as a line, the budget dashed."""
    name, unit = ("kl_mean", "mean KL to FP16 (nats)")
    if found["identity"]["objective"] == "accuracy":
        name, unit = ("accuracy", "accuracy on the search's prompts")
    path = folder / "front"
    front = _front(trials)
    with figure(path, size=(6.4, 4.0)) as (whole, [axis]):
        axis.scatter(trials["bits"], trials[name], s=18, color="#999999", label="tables")
        style: dict[str, Any] = {"color": PALETTE[0], "marker": MARKERS[0]}
        axis.plot(front["bits"], front[name], label="Pareto front", **style)
        axis.axvline(found["budget"], color="black", linestyle="--", label="budget")
        axis.set(xlabel="stored bits an element", ylabel=unit)
        if name == "kl_mean" and (trials[name] > 0).all():
            axis.set_yscale("log")
        legend_below(whole, axis, columns=3)
    return path
