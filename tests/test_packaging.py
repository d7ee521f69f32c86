"""What a wheel, a checkout and an import of kvbench bring with them, and what they must not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.dependency_versions_table import deps as transformers_deps

import kvbench

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
DATA = SETUPTOOLS["package-data"]["*"]
FOLDERS = [
    name
    for name in ("kvbench", "methods", "tasks", "kernels", "results/paper")
    if (ROOT / name).is_dir() and any((ROOT / name).iterdir())
]


def run(
    *arguments: str, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with `path` as its PYTHONPATH."""
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def copy_code(name: str, tree: Path) -> None:
    """Copy one of the project's folders, without what Python left there."""
    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))


def folder_of(package: str) -> Path:
    """The folder that pyproject.toml maps a package to; the longest mapped prefix counts."""
    mapping: dict[str, str] = SETUPTOOLS["package-dir"]
    prefix = max((key for key in mapping if f"{package}.".startswith(f"{key}.")), key=len)
    return ROOT / mapping[prefix] / package[len(prefix) + 1 :].replace(".", "/")


def shipped(folder: Path) -> list[Path]:
    """Modules and data files directly in a folder."""
    patterns = ["*.py", *DATA]
    return [
        file
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns)
    ]


def test_every_folder_with_code_or_data_is_a_listed_package() -> None:
    found = {
        folder
        for name in FOLDERS
        for folder in [ROOT / name, *(path for path in (ROOT / name).rglob("*") if path.is_dir())]
        if "__pycache__" not in folder.parts and shipped(folder)
    }
    assert {folder_of(package) for package in SETUPTOOLS["packages"]} == found


def test_kernels_is_no_regular_package() -> None:
    """transformers probes a package called kernels, and would take ours for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_checkout_runs_without_installation(tmp_path: Path) -> None:
    for name in FOLDERS:
        copy_code(name, tmp_path)
    done = run("-m", "kvbench", "--version", cwd=tmp_path)
    assert done.stdout.startswith("kvbench "), done.stderr
    code = "import kvbench.methods, kvbench.tasks as t; print(kvbench.methods.__file__, t.__file__)"
    done = run("-c", code, cwd=tmp_path)
    expected = [str(tmp_path / "methods/__init__.py"), str(tmp_path / "tasks/__init__.py")]
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "kvbench",
        "kvbench.cli",
        "kvbench.registry",
        "kvbench.evaluation.request",
        "kvbench.evaluation.store",
        "kvbench.report",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval'}"
    done = run("-c", f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_transformers_imports_beside_a_package_called_kernels(tmp_path: Path) -> None:
    """In the repository's root, an installed `kernels` must win over our folder of that name."""
    accepted = Requirement(transformers_deps["kernels"]).specifier
    lowest = next(item.version for item in accepted if item.operator in (">=", "=="))
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"__version__ = {lowest!r}\ndef __getattr__(name):\n    return type(name, (), {{}})\n"
    )
    info = tmp_path / f"kernels-{lowest}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {lowest}\n")
    code = (
        "from transformers.integrations import hub_kernels; import kernels; print(kernels.__file__)"
    )
    done = run("-c", code, path=tmp_path)
    assert done.stdout.strip() == str(package / "__init__.py"), done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is left in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        copy_code(name, tree)
    done = run("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tree / "dist").glob(f"kvbench-{kvbench.__version__}-*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_all_modules_and_data(wheel: Path) -> None:
    expected = {
        f"{package.replace('.', '/')}/{file.name}"
        for package in SETUPTOOLS["packages"]
        for file in shipped(folder_of(package))
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert expected == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_an_unpacked_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = run("-m", "kvbench", "list", "tasks", cwd=tmp_path, path=site)
    assert "ObjectExistence" in done.stdout, done.stderr
    done = run("-c", "import kvbench; print(kvbench.__file__)", cwd=tmp_path, path=site)
    assert done.stdout.strip() == str(site / "kvbench/__init__.py")
