"""Python and packages, against what kvbench asks for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from kvbench.doctor.findings import Finding, Status
from kvbench.evaluation.environment import environment

SECTION = "versions"


def versions() -> Iterator[Finding]:
    """What is installed, then what is missing or of the wrong version."""
    found = environment()
    packages = found["packages"]
    told = ["kvbench", "python", *(name for name in packages if packages[name])]
    numbers = {**packages, "kvbench": found["kvbench"], "python": found["python"]}
    text = ", ".join(f"{name} {numbers[name]}" for name in told)
    yield Finding(SECTION, Status.OK, "installed", f"{text}; {found['platform']}")
    yield from _commit(found)
    try:
        wanted = metadata.requires("kvbench") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            SECTION,
            Status.NOTE,
            "requirements",
            "kvbench runs from a checkout that is not installed, so nothing says what it needs",
            "run pip install -e . in the checkout",
        )
        return
    for text in wanted:
        yield from _unmet(Requirement(text))


def _commit(found: dict[str, object]) -> Iterator[Finding]:
    if found["modified"]:
        yield Finding(
            SECTION,
            Status.NOTE,
            "checkout",
            f"commit {str(found['commit'])[:12]} with uncommitted changes",
            "commit before a run whose numbers you publish: result rows name the version only",
        )


def _unmet(requirement: Requirement) -> Iterator[Finding]:
    """A fault if a requirement that is not of an extra isn't met."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = "missing"
    if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
        yield Finding(
            SECTION,
            Status.FAIL,
            requirement.name,
            f"is {version}, kvbench needs {requirement.specifier or 'it'}",
            f"run pip install '{requirement.name}{requirement.specifier}'",
        )
