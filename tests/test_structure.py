"""Rules of the tree: who may import whom, and how long a file or a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbench.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kvbench", "methods", "tasks", "kernels")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

# Part of the project -> parts that it may import besides itself. Types for annotations only, which
# are imported under TYPE_CHECKING, are not counted.
ALLOWED = {
    "defaults": set(),
    "errors": set(),
    "specs": {"errors"},
    "registry": {"errors", "specs"},
    "kernels": set(),
    "cache": {"errors", "kernels", "registry"},
    "methods": {"cache", "errors"},
    "tasks": {"errors", "registry"},
    "models": {"cache", "errors", "registry", "specs", "tasks"},
    "evaluation": {"cache", "defaults", "errors", "models", "registry", "specs", "tasks"},
    "efficiency": {
        "cache",
        "defaults",
        "errors",
        "evaluation",
        "kernels",
        "models",
        "registry",
        "specs",
    },
    "analysis": {"cache", "errors", "evaluation", "registry", "specs"},
    "matching": {
        *("analysis", "cache", "defaults", "errors", "evaluation", "models", "perplexity"),
        *("registry", "specs"),
    },
    "perplexity": {"cache", "errors", "evaluation", "models"},
    "tuning": {
        *("analysis", "cache", "defaults", "errors", "evaluation", "models", "registry", "specs"),
    },
    "report": {"defaults", "efficiency", "errors", "evaluation", "perplexity"},
    "doctor": {
        *("cache", "efficiency", "errors", "evaluation", "kernels", "models", "registry", "tasks"),
    },
    "api": {"defaults", "efficiency", "errors", "evaluation", "report"},
    "skeletons": {"errors", "registry"},
    "cli": {
        *(
            "analysis",
            "api",
            "defaults",
            "doctor",
            "efficiency",
            "errors",
            "evaluation",
            "matching",
        ),
        *("perplexity", "registry", "report", "skeletons", "specs", "tasks", "tuning"),
    },
    "__main__": {"cli"},
    "__init__": set(),
}
# Of some parts, another part sees these modules only: a report reads rows and what is computed from
# them; efficiency takes what any run needs, without tasks; an evaluation knows the contract of
# tasks.
SEES = {
    ("tuning", "models"): {"vision"},
    ("matching", "models"): {"inputs"},
    ("report", "evaluation"): {"files", "rows", "statistics", "store", "typed"},
    ("report", "efficiency"): {"rows"},
    ("report", "perplexity"): {"rows"},
    ("doctor", "evaluation"): {"choices", "environment", "hardware", "request", "rows"},
    ("doctor", "efficiency"): {"decoder", "support", "workload"},
    ("doctor", "tasks"): {"base"},
    ("efficiency", "evaluation"): {
        *("choices", "environment", "files", "hardware", "lines"),
        *("progress", "request", "store", "typed"),
    },
    ("evaluation", "tasks"): {"base", "images"},
}


def part_of(file: Path) -> str:
    """The part of the project that a file belongs to."""
    relative = file.relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] == "kvbench" else relative.parts
    return parts[0].removesuffix(".py")


def project_imports(file: Path) -> Iterator[str]:
    """Dotted names below kvbench that a file imports when it runs."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("kvbench.") for name in names if name.startswith("kvbench."))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_layers(file: Path) -> None:
    part = part_of(file)
    for name in project_imports(file):
        target, _, rest = name.partition(".")
        if target not in ALLOWED:
            continue  # an attribute of the package itself, such as __version__
        assert target == part or target in ALLOWED[part], f"{part} imports kvbench.{name}"
        if (part, target) in SEES:
            assert rest.split(".")[0] in SEES[part, target], f"{part} imports kvbench.{name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    lengths = {
        node.name: lines_of(node) - docstring_lines(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION}


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Public functions of the API explain every argument; that makes them no harder to read."""
    return lines_of(node.body[0]) if ast.get_docstring(node) else 0


def test_the_harness_names_methods_in_one_place() -> None:
    """The paper's sweeps apart; fp16 and fp8 are also formats of numbers."""
    names = set(METHODS.names()) - {"fp16", "fp8"}
    apart = {"defaults.py", "sweeps.py"}
    for file in FILES:
        if file.relative_to(ROOT).parts[0] != "kvbench" or file.name in apart:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and " " not in str(node.value):
                named = {part.partition("[")[0] for part in str(node.value).split(",")}
                assert not named & names, f"{file}:{node.lineno}"


def test_every_part_has_a_rule() -> None:
    assert {part_of(file) for file in FILES} <= set(ALLOWED)
