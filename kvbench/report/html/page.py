"""One self-contained page of an output folder: tables, figures, single samples, how it was made."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import __version__
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.store import RUN, SAMPLES
from kvbench.report.board import SETTING_COLUMNS, Block, Leaderboard, build
from kvbench.report.efficiency import BASES, EfficiencyBlock, efficiency_blocks
from kvbench.report.header import PROTOCOLS, title
from kvbench.report.html import charts, tables
from kvbench.report.html.samples import Questions, answers, pictures_data, questions_data
from kvbench.report.paper import label, paper_table
from kvbench.report.text import MISSING, several
from kvbench.report.write import EFFICIENCY

if TYPE_CHECKING:
    import jinja2

    from kvbench.efficiency.rows import EfficiencyRow

_TEMPLATE, _STYLE, _SCRIPT = "page.html.j2", "page.css", "page.js"


@dataclass(frozen=True)
class Content:
    """What a page is made of.

    Attributes:
        rows: Result rows of samples, in any order.
        run: Content of ``run.json``.
        efficiency: Rows of memory and speed.
        questions: The samples' own texts and pictures, where the data are at hand.
        remarks: What is to be said of the data, in sentences.
        files: Names of the files that the rows come from, with their SHA-256.
    """

    rows: Sequence[SampleRow]
    run: Mapping[str, Any]
    efficiency: Sequence[EfficiencyRow] = ()
    questions: Questions | None = None
    remarks: Sequence[str] = ()
    files: Mapping[str, str] | None = None


def write_page(path: Path, content: Content) -> None:
    """Write the page.

    Raises:
        UserError: The file can't be written.
    """
    write_atomically(path, page(content))


def page(content: Content) -> str:
    """Return the page's HTML. Everything is in it: it asks for no other file, and may not."""
    from markupsafe import Markup

    board = build(content.rows, content.run)
    named = [(_name(block, board), block) for block in board.blocks]
    questions = content.questions or {}
    script = _read(_SCRIPT)
    style = Markup(_read(_STYLE))  # a file of this package, as the script is  # nosec B704
    values = {
        "style": style,
        "script": Markup(script),  # nosec B704
        "policy": _policy(script),
        "version": __version__,
        "row_count": len(content.rows),
        "blocks": [_block(number, *pair) for number, pair in enumerate(named)],
        "choices": _choices(board),
        "protocols": PROTOCOLS,
        "efficiency": [_speed(block) for block in efficiency_blocks(content.efficiency)],
        "speed_charts": charts.efficiency_charts(content.efficiency),
        "answers": answers(board.blocks, content.rows),
        "questions": {"/".join(key): questions_data(found) for key, found in questions.items()},
        "pictures": {"/".join(key): pictures_data(found) for key, found in questions.items()},
        "remarks": content.remarks,
        "settings": tables.settings(named),
        "made": _made(content, board),
    }
    return _environment().get_template(_TEMPLATE).render(values)


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of the files that a page of this folder rests on."""
    names = (SAMPLES, RUN, EFFICIENCY)
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in names
        if (directory / name).is_file()
    }


def _environment() -> jinja2.Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        autoescape=True,
        loader=FunctionLoader(_read),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    # Drawn by this package, which escapes the texts in it.
    made.filters["svg"] = lambda chart: Markup(chart.svg)  # nosec B704
    return made


def _read(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What a browser may load for this page: its own pictures, styles and this one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _choices(board: Leaderboard) -> dict[str, dict[str, str]]:
    """What the filters offer, with labels, in the order of the tables."""
    paper = paper_table()
    models = {b.setting.model: label(paper.models, b.setting.model) for b in board.blocks}
    tasks = {task: label(paper.tasks, task) for b in board.blocks for task in b.tasks}
    protocols = {b.setting.protocol: b.setting.protocol for b in board.blocks}
    return {"model": models, "protocol": protocols, "task": tasks}


def _name(block: Block, board: Leaderboard) -> str:
    """Model, protocol and data; what else differs, where these are not enough."""
    alike = [other.setting for other in board.blocks if title(other) == title(block)]
    known = ("model", "protocol", "dataset")
    alike = [setting for setting in alike if setting.dataset == block.setting.dataset]
    parts = [title(block), block.setting.dataset]
    for field in SETTING_COLUMNS:
        if field not in known and len({getattr(setting, field) for setting in alike}) > 1:
            parts.append(f"{field} {getattr(block.setting, field)}")
    return ", ".join(parts)


def _block(number: int, name: str, block: Block) -> dict[str, Any]:
    return {
        "number": number,
        "name": name,
        "setting": block.setting,
        "samples": several(block.samples),
        "leaderboard": tables.leaderboard(block, f"{name}: accuracy in percent"),
        "differences": tables.differences(block, f"{name}: differences to FP16"),
        "failures": tables.failures(block, f"{name}: failures"),
        "tradeoff": charts.tradeoff(block, f"tradeoff{number}"),
        "forest": charts.forest(block, f"forest{number}"),
    }


def _speed(block: EfficiencyBlock) -> dict[str, Any]:
    name = _speed_name(block)
    return {
        "name": name,
        "basis": BASES[block.setting.memory],
        "table": tables.efficiency(block, f"{name}: batch, memory and speed"),
    }


def _speed_name(block: EfficiencyBlock) -> str:
    setting = block.setting
    tokens = f"{setting.input_tokens} tokens in, {setting.output_tokens} out"
    return f"{setting.model_label}, {setting.gpu_label} ({setting.memory}), {tokens}"


def _made(content: Content, board: Leaderboard) -> dict[str, dict[str, str]]:
    """How the numbers came about: heading -> names and values; what isn't known is left out."""
    parts = {
        "Run": _run(content.run, board),
        "Files (SHA-256)": dict(content.files or {}),
        "Calibrations": {
            f"{row.model}, {row.method}, {row.protocol}": row.calibration
            for row in sorted(content.rows, key=lambda row: (row.model, row.method, row.protocol))
            if row.calibration
        },
    }
    for block in efficiency_blocks(content.efficiency):
        parts[_speed_name(block)] = _speed_facts(block)
    known = {
        heading: {name: value for name, value in facts.items() if value != MISSING}
        for heading, facts in parts.items()
    }
    return {heading: facts for heading, facts in known.items() if facts}


def _run(run: Mapping[str, Any], board: Leaderboard) -> dict[str, str]:
    ran = run.get("environment")
    ran = ran if isinstance(ran, Mapping) else {}
    packages = ran.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    texts = ("kvbench", "commit", "platform", "python")
    return {
        "command": board.command or MISSING,
        **{name: str(ran.get(name) or MISSING) for name in texts},
        "devices": several(ran.get("devices") or ()),
        "packages": several(f"{name} {v}" for name, v in sorted(packages.items()) if v),
    }


def _speed_facts(block: EfficiencyBlock) -> dict[str, str]:
    setting, rows = block.setting, [entry.row for entry in block.entries]
    installed = {pair for row in rows for pair in row.versions.items() if pair[1] is not None}
    return {
        "command": several(sorted({row.command for row in rows})),
        "weights": f"{setting.revision or MISSING}, {setting.dtype}",
        "protocol": setting.protocol,
        "computed on": setting.device or MISSING,
        "packages": several(f"{name} {version}" for name, version in sorted(installed)),
        "machine": several(sorted({row.machine for row in rows})),
    }
