"""What product code never does: run what it reads, fetch anything, or trust the wall clock."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kvbench", "methods", "tasks", "kernels")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),  # run code
    *("requests", "urllib.request", "urllib3", "http.client", "httpx", "aiohttp", "wget"),  # fetch
    *("ftplib", "socket", "telnetlib", "smtplib"),
}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load", "pickle.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader"),
    *("yaml.UnsafeLoader", "yaml.FullLoader"),
    *("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"),
    *("hf_hub_download", "huggingface_hub.hf_hub_download", "datasets.load_dataset"),
    *("time.time", "time.time_ns"),  # may go back
}

PROBES = {"kvbench/evaluation/workers_ray.py"}
"""Files that may see whether an address which the user gave answers; they send nothing."""


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is forbidden."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names] + [str(node.module)]
            for name in names:
                parts = name.split(".")
                dotted = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
                yield from ((line, found) for found in dotted & FORBIDDEN_MODULES)
                yield from ((line, name) for _ in {name} & FORBIDDEN_CALLS)
        elif isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            if name in FORBIDDEN_CALLS:
                yield line, name
        elif isinstance(node, ast.keyword):
            yield from _options(node, line)


def _options(node: ast.keyword, line: int) -> Iterator[tuple[int, str]]:
    """Keyword arguments that undo a library's care."""
    value = ast.unparse(node.value)
    if node.arg == "trust_remote_code" and value != "False":
        yield line, f"trust_remote_code={value}"
    if node.arg == "use_safetensors" and value != "True":
        yield line, f"use_safetensors={value}"
    if node.arg in ("shell", "allow_pickle", "weights_only") and value != "False":
        yield line, f"{node.arg}={value}"
    if node.arg == "local_files_only" and value != "True":
        yield line, f"local_files_only={value}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unsafe_is_called(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = list(faults(tree))
    if file.relative_to(ROOT).as_posix() in PROBES and only_probes(tree):
        found = [(line, name) for line, name in found if name != "socket"]
    assert not found, f"{file.relative_to(ROOT)}: {found}"


def only_probes(tree: ast.AST) -> bool:
    """Whether a socket is connected and closed at once, and `socket` is named for nothing else."""
    named = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "socket"]
    probes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "close"
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "socket.create_connection"
    ]
    imported = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == "socket")
        or (
            isinstance(node, ast.Import)
            and any(alias.name == "socket" and alias.asname for alias in node.names)
        )
    ]
    return len(probes) == len(named) and not imported


@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("import socket\nsocket.create_connection(at, timeout=1).close()", True),
        ("import socket\nsocket.create_connection(at).sendall(data)", False),
        ("import socket\ns = socket.create_connection(at)", False),
        ("from socket import create_connection\ncreate_connection(at)", False),
        ("import socket as s\ns.socket()", False),
    ],
)
def test_a_probe_sends_nothing(text: str, sound: bool) -> None:
    assert only_probes(ast.parse(text)) == sound


def loads(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of what would ask a hub for what isn't here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("from_pretrained", "snapshot_download"):
                yield node


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_whatever_is_loaded_lies_here(file: Path) -> None:
    for call in loads(ast.parse(file.read_text(encoding="utf-8"))):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{file.relative_to(ROOT)}:{call.lineno}"
        assert given.get("local_files_only") == "True", f"{where}: local_files_only=True is missing"
        assert given.get("trust_remote_code", "False") == "False", where


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import requests as r",
        "from urllib.request import urlopen",
        "from http import client\nfrom http.client import HTTPSConnection",
        "import torch\ntorch.load(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "Model.from_pretrained(path, trust_remote_code=True)",
        "Model.from_pretrained(path, trust_remote_code=given)",
        "subprocess.run(words, shell=True)",
        "from huggingface_hub import hf_hub_download",
        "time.time()",
        "eval(text)",
    ],
)
def test_the_check_sees_what_it_looks_for(code: str) -> None:
    assert list(faults(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["yaml.safe_load(text)", "torch.save(x, path)", "from safetensors.torch import load"]
)
def test_the_check_lets_safe_code_be(code: str) -> None:
    assert not list(faults(ast.parse(code)))
