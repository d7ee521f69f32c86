"""An analysis in words and tables (Markdown), and its figures; all from the CSV files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kvbench.evaluation.files import write_atomically
from kvbench.report.attention_figures import draw_attention
from kvbench.report.board import Leaderboard
from kvbench.report.columns import Columns, read_columns
from kvbench.report.documents import read_document
from kvbench.report.error_figures import draw_errors
from kvbench.report.figures import files
from kvbench.report.text import MISSING, code, markdown_table, several


def write_analysis(folder: Path) -> list[Path]:
    """Draw the figures of an analysis folder and write ``analysis.md``; returns all files.

    Raises:
        UserError: a table is missing or broken, or the folder can't be written to.
    """
    drawn = files([*draw_attention(folder), *draw_errors(folder)])
    path = folder / "analysis.md"
    write_atomically(path, _markdown(folder))
    return [path, *sorted(folder.glob("*.csv")), *drawn]


def analysis_summary(folder: Path) -> str:
    """Table I of a model in a few lines, and how `eval` takes what was found.

    Raises:
        UserError: a table is missing or broken.
    """
    found = read_document(folder / "analysis.json", "analyze")
    patterns = read_columns(folder / "patterns.csv")
    sure = "sure" if found["sure"] else "not sure: see the intervals"
    prompts = len(found["prompts"])
    lines = [f"{found['label']}, {prompts} prompts of {found['dataset']} ({sure}):"]
    lines += [f"  {kind:8s}{ranges}" for kind, ranges in _kinds(patterns).items()]
    if tuple(found["text_salient_layers"]) != tuple(found["zoo_text_salient_layers"]):
        lines.append(f'  to use it: kvbench eval --models "{found["models_option"]}"')
    return "\n".join(lines)


def layer_ranges(layers: Iterable[int]) -> str:
    """Numbers of layers as the paper writes them: ``0-1, 4``."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return several(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _kinds(patterns: Columns) -> dict[str, str]:
    """Layers of each kind."""
    return {
        kind: layer_ranges(int(line["layer"]) for line in patterns.lines if line["pattern"] == kind)
        for kind in ("TSA", "PSA", "neither")
    }


def _markdown(folder: Path) -> str:
    found = read_document(folder / "analysis.json", "analyze")
    patterns = read_columns(folder / "patterns.csv")
    kinds = _kinds(patterns)
    zoo = layer_ranges(found["zoo_text_salient_layers"])
    tokens = [prompt["tokens"] for prompt in found["prompts"]]
    head = (
        f"# {found['label']}: attention, pivots and errors\n\n"
        f"{len(tokens)} prompts of {found['dataset']}, {min(tokens)} to {max(tokens)} tokens, "
        f"{found['dtype']}. Made by {code(found['command'])} on {Leaderboard((), found).machine}; "
        f"kvbench {found['version']}. Intervals are 95 %, over prompts.\n"
    )
    table1 = markdown_table(
        ["Model", "TSA", "PSA", "neither", "TSA in the zoo"],
        [[found["label"], kinds["TSA"], kinds["PSA"], kinds["neither"], zoo]],
        5,
    )
    parts = [
        head,
        "## Layers (Table I)\n\n" + table1,
        _PATTERNS_TEXT.format(near=found["near"]),
        _patterns(patterns),
        "## Massive activations and pivots\n\n" + _DETECTOR_TEXT.format(name=found["detector"]),
        _detector(folder),
    ]
    if (folder / "errors.csv").exists():
        parts += ["## Error budget\n\n" + _ERRORS_TEXT, _errors(folder)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_PATTERNS_TEXT = """\
A layer favours text when most of its heads give a text token more weight than a vision token, as
the same queries see both; the first five tokens and keys fewer than {near} tokens before the query
are left out. It is PSA when the 15 tokens that draw most hold half of the attention beyond those
{near} tokens. TSA are the first layers, as long as they favour text and aren't PSA. "Sure" is what
holds all over the intervals."""

_DETECTOR_TEXT = """\
Massive: magnitude above 100 and 1,000 times the median (Sun et al.). Dominant: a token that gets
ten times the mean token's attention from far queries. Precision and recall hold the tokens that
`{name}` keeps exact against these; "captured" is the share of attention that its tokens draw,
"best" what the best 15 would."""

_ERRORS_TEXT = """\
Relative errors ‖stored - exact‖ / ‖exact‖ over a prompt, mean over layers, the layer's input exact.
KL of the first answer token when one layer alone is quantized: its sum over layers, and the layer
with the largest."""


def _patterns(table: Columns) -> str:
    lines = [
        [
            line["layer"],
            line["pattern"],
            "yes" if line["sure"] == "true" else "no",
            _range(line, "text_over_vision", "{:.2f}"),
            f"{float(line['heads_favouring_text']):.0%}",
            f"{line['prompts_favouring_text']}/{line['prompts']}",
            _range(line, "top15_share", "{:.2f}"),
        ]
        for line in table.lines
    ]
    headers = ["Layer", "Pattern", "Sure", "Text / vision", "Heads", "Prompts", "Top 15"]
    return markdown_table(headers, lines, 3)


def _detector(folder: Path) -> str:
    massive = read_columns(folder / "massive_activations.csv")
    detector = read_columns(folder / "pivot_detector.csv")
    lines = [
        [
            line["layer"],
            f"{float(line['largest']):.0f}",
            f"{float(line['massive']):.1f}",
            f"{float(line['massive_beyond_first']):.1f}",
            f"{float(line['detected_vision']):.1f}",
            *(
                _range(other, name, "{:.2f}" if name != "dominant" else "{:.1f}")
                for name in ("dominant", "precision", "recall")
            ),
            f"{float(other['captured']):.2f} / {float(other['top15']):.2f}",
        ]
        for line, other in zip(massive.lines, detector.lines, strict=True)
    ]
    headers = ["Layer", "Largest", "Massive", "beyond first", "Vision of the detected"]
    headers += ["Dominant", "Precision", "Recall", "Captured / best"]
    return markdown_table(headers, lines, 1)


def _range(line: dict[str, str], name: str, form: str) -> str:
    """A mean with its interval, if it has one."""
    if not line[name]:
        return MISSING
    value, *ends = (line[key] for key in (name, f"{name}_low", f"{name}_high"))
    shown = form.format(float(value))
    if not all(ends):
        return shown
    return f"{shown} [{', '.join(form.format(float(end)) for end in ends)}]"


def _errors(folder: Path) -> str:
    table = read_columns(folder / "errors.csv")
    lines = []
    for method in table.distinct("method"):
        part = table.where("method", method)
        means = [f"{part[name].mean():.3f}" for name in ("key", "value", "output")]
        lines.append([method, *means, *_worst(part, "exact"), *_worst(part, "quantized")])
    headers = ["Method", "K", "V", "Output"]
    for protocol in ("exact", "quantized"):
        headers += [f"KL, {protocol} prefill", "Worst layer"]
    return markdown_table(headers, lines, 1)


def _worst(part: Columns, protocol: str) -> Sequence[str]:
    values = part[f"kl_{protocol}"]
    if not np.isfinite(values).all():
        return MISSING, MISSING
    worst = int(values.argmax())
    return f"{values.sum():.2g}", f"{part.texts('layer')[worst]} ({values[worst]:.2g})"
