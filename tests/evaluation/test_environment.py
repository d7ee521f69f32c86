"""What run.json says of the machine and the code."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import kvbench
from kvbench.evaluation import environment


def test_versions_are_those_installed() -> None:
    found = environment.environment()
    assert found["kvbench"] == kvbench.__version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == version("numpy")
    assert found["cpus"] >= 1


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package-here",))
    assert environment.environment()["packages"] == {"no-such-package-here": None}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    module = tmp_path / "kvbench" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    monkeypatch.setattr(kvbench, "__file__", str(module))
    commit = git("rev-parse", "HEAD")
    found = environment.environment()
    assert (found["commit"], found["modified"]) == (commit, False)
    module.write_text("changed = True")
    assert environment.environment()["modified"] is True
    monkeypatch.setattr(kvbench, "__file__", str(tmp_path / "site" / "kvbench" / "__init__.py"))
    (tmp_path / "site" / "kvbench").mkdir(parents=True)
    found = environment.environment()
    assert (found["commit"], found["modified"]) == (None, None)
