"""A real little package, installed beside kvbench, adds a method, a model and a task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kvbench", "methods", "tasks", "kernels", "results/paper")
Run = Callable[..., subprocess.CompletedProcess[str]]

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "shop"
version = "1.0"

[project.entry-points."kvbench.methods"]
shop4 = "shop:SHOP4"
raises = "shop_broken:METHOD"
class_not_instance = "shop:Shop4"
clumsy = "shop:CLUMSY"

[project.entry-points."kvbench.models"]
shop_llava = "shop:MODEL"
shop_loader = "shop:LOADER"

[project.entry-points."kvbench.tasks"]
counting = "shop:TASK"
misnamed = "shop:TASK"

[tool.setuptools]
py-modules = ["shop", "shop_broken"]
"""
CODE = """\
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from kvbench import KVQuantizer, ModelEntry
from kvbench.cache import Affine, LayerQuantizer, Needs, Side, Uniform
from kvbench.tasks.milebench import MileBenchTask


@dataclass(frozen=True)
class Shop4:
    label: ClassVar[str] = "Shop INT4"
    paper: ClassVar[str] = "-"
    needs: ClassVar[Needs] = Needs()

    group_size: int = 16

    def layer(self, spec, calibration):
        side = Side({4: Affine(4, min(self.group_size, spec.head_dim))})
        return LayerQuantizer(side, side, Uniform(4))


@dataclass(frozen=True)
class ClumsyPlan(Uniform):
    def prompt(self, tokens):
        return tokens.no_such_thing


@dataclass(frozen=True)
class Clumsy(Shop4):
    def layer(self, spec, calibration):
        side = super().layer(spec, calibration).key
        return LayerQuantizer(side, side, ClumsyPlan(4))


@dataclass(frozen=True)
class Counting(MileBenchTask):
    def default_root(self):
        root = Path(os.environ["SHOP_DATA"])
        images = root / self.folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        samples = []
        for number in range(2):
            name = f"{number}.png"
            Image.new("RGB", (56, 56), (60 * number, 0, 200)).save(images / name)
            samples.append({
                "sample_id": number,
                "task_instruction_id": 0,
                "task_instance": {
                    "context": "<ImageHere> How many squares?".replace("<ImageHere>", "{image#1}"),
                    "images_path": [name],
                    "choice_list": ["one", "two"],
                },
                "response": "one",
                "image_quantity_level": "Few",
            })
        meta = {
            "dataset": self.folder,
            "question_type": "multi-choice",
            "task_instruction": ["Count."],
        }
        path = root / self.folder / f"{self.folder}.json"
        path.write_text(json.dumps({"meta_data": meta, "data": samples}))
        return root


def load(device, dtype):
    raise RuntimeError("the weights are on holiday")


SHOP4 = Shop4()
CLUMSY = Clumsy()
MODEL = ModelEntry(
    "shop_llava", "Shop LLaVA", "llava", folder=Path(os.environ.get("SHOP_MODEL", "/no/such")),
    tokens_per_image=16, dtype="float32",
)
LOADER = ModelEntry("shop_loader", "Shop loader", "llava", loader="shop:load")
TASK = Counting("counting", "COUNT", "Counting", "Counting", suite="shop")
"""


def pip(python: Path, *paths: Path) -> None:
    """Install projects without network and without build isolation, as in a sealed room."""
    options = "--no-deps --no-build-isolation --no-index --disable-pip-version-check --quiet"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    command += [*options.split(), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llava_folder: Path) -> Run:
    """Runs `kvbench` of a venv that has kvbench and the package, and else what we have."""
    base = tmp_path_factory.mktemp("shop")
    project, package = base / "kvbench", base / "package"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    package.mkdir()
    (package / "pyproject.toml").write_text(PROJECT)
    (package / "shop.py").write_text(CODE)
    (package / "shop_broken.py").write_text("raise RuntimeError('half installed')\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "venv"], check=True)
    python = base / "venv/bin/python"
    # As --system-site-packages, but of the environment that runs the tests: its setuptools, and
    # whatever kvbench needs. A kvbench in there, an editable one perhaps, comes second.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = base / "venv/lib" / version / "site-packages"
    (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip(python, project, package)
    kept = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    environment = kept | {
        "SHOP_MODEL": str(tiny_llava_folder),
        "SHOP_DATA": str(base / "data"),
        "XDG_CACHE_HOME": str(base / "cache"),
    }

    def kvbench(*words: object) -> subprocess.CompletedProcess[str]:
        command = [base / "venv/bin/kvbench", *map(str, words)]
        return subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)

    return kvbench


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("methods", ["Shop INT4", "group_size=16"]),
        ("models", ["Shop LLaVA", "shop:load"]),
        ("tasks", ["COUNT", "shop"]),
    ],
)
def test_list_shows_them_and_what_is_broken(run: Run, kind: str, parts: list[str]) -> None:
    done = run("list", kind)
    assert done.returncode == 0, done.stderr
    broken = {
        "methods": [
            "plug-in shop_broken:METHOD, which can't be imported (RuntimeError: half installed, ",
            "shop:Shop4 is a class: a method must be an instance, Shop4(...)",
        ],
        "models": [],
        "tasks": ["registered as 'misnamed' and calls itself 'counting'"],
    }[kind]
    for part in [*parts, *broken]:
        assert part in done.stdout
    assert done.stdout.count("broken: ") == len(broken)


@pytest.mark.slow
def test_eval_runs_them(run: Run, tmp_path: Path) -> None:
    grid = "--methods fp16,shop4[group_size=8] --models shop_llava --tasks counting"
    done = run("eval", *grid.split(), "--device", "cpu", "--max-new-tokens", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "samples.jsonl")
    assert {(row["model"], row["task"], row["method"], row["status"]) for row in found} == {
        ("shop_llava", "counting", method, "ok") for method in ("fp16", "shop4[group_size=8]")
    }
    assert len(found) == 4
    shop4 = [row for row in found if row["method"] != "fp16"]
    # 4-bit codes with a 16- or 32-bit scale and a zero point for every 8 numbers.
    assert all(4 < row["bits_per_element"] < 16 for row in shop4)  # type: ignore[operator]
    assert all(row["packed_tokens_read"] for row in shop4)
    assert "Shop" not in (tmp_path / "table2.md").read_text()  # tables name methods as typed
    assert "shop4" in (tmp_path / "table2.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_one_that_fails_leaves_the_others_their_rows(
    run: Run, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    grid = "--methods fp16,clumsy,shop4 --models shop_llava --tasks counting --device cpu"
    words = [*grid.split(), "--max-new-tokens", "3", *workers]
    done = run("eval", *words, "--out", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kvbench: ")]
    assert line.startswith("kvbench: clumsy failed 2 times (AttributeError: 'Tokens' object has")
    assert "shop.py:" in line
    assert "Shop INT4" in done.stdout or "shop4" in done.stdout  # the others' table
    found = {(row["method"], row["status"]) for row in rows(tmp_path / "samples.jsonl")}
    assert found == {("fp16", "ok"), ("clumsy", "error"), ("shop4", "ok")}


@pytest.mark.slow
def test_efficiency_models_them(run: Run, tmp_path: Path) -> None:
    words = "--methods fp16,shop4 --models shop_llava --input-tokens 40 --output-tokens 4"
    done = run("efficiency", *words.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = {str(row["method"]): row for row in rows(tmp_path / "efficiency.jsonl")}
    assert found["shop4"]["label"] == "Shop INT4"
    assert found["shop4"]["memory"] == "modelled"
    assert found["shop4"]["code"] != found["fp16"]["code"]  # its own source counts
    plan = run("efficiency", *words.split(), "--plan")
    assert plan.returncode == 0, plan.stderr
    assert [line.split()[:2] for line in plan.stdout.splitlines()[2:4]] == [
        ["shop_llava", "fp16"],
        ["shop_llava", "shop4"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--methods raises", "method 'raises' comes from the plug-in shop_broken:METHOD"),
        ("--methods class_not_instance", "shop:Shop4 is a class: a method must be an instance"),
        (
            "--methods shop4[group=8]",
            "unknown parameter 'group' of Shop4: did you mean group_size?",
        ),
        ("--methods fp16 --tasks misnamed", "give the task one name"),
        ("--methods fp16 --models shop_loader", "the loader shop:load of model 'shop_loader'"),
    ],
)
def test_what_is_broken_is_one_line(run: Run, tmp_path: Path, words: str, part: str) -> None:
    tasks = [] if "--tasks" in words else ["--tasks", "counting"]
    done = run("eval", *words.split(), *tasks, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kvbench: ")]
    assert part in line
