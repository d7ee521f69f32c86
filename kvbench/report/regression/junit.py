"""A comparison as JUnit XML, which CI systems show as a list of tests."""

from __future__ import annotations

from xml.etree import ElementTree  # XML is written here, never read  # nosec B405

from kvbench.report.regression.result import Comparison, Line, Method
from kvbench.report.text import plain


def junit_xml(comparison: Comparison) -> str:
    """Return a suite for each method and protocol, a test for its mean and for each task."""
    root = ElementTree.Element("testsuites", name="kvbench compare")
    for method in comparison.methods:
        _suite(root, method)
    for element in (root, *root):
        tests = list(element.iter("testcase"))
        element.set("tests", str(len(tests)))
        element.set("failures", str(sum(len(test) > 0 for test in tests)))
        element.set("errors", "0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def _suite(root: ElementTree.Element, method: Method) -> None:
    key = method.mean.key
    name = plain(f"{key.model}.{key.protocol}.{key.method}")
    suite = ElementTree.SubElement(root, "testsuite", name=name)
    for line in (method.mean, *method.tasks):
        test = ElementTree.SubElement(suite, "testcase", classname=name, name=plain(line.key.task))
        if line.faults:
            text = "; ".join(f"{fault.kind}: {fault.text}" for fault in line.faults)
            failure = ElementTree.SubElement(test, "failure", type=line.faults[0].kind)
            failure.set("message", plain(text))
            failure.text = plain(_numbers(line))


def _numbers(line: Line) -> str:
    counts = line.counts
    before, now = (
        "no score" if share is None else f"{100 * share:.2f} %" for share in (line.before, line.now)
    )
    return (
        f"accuracy before {before}, now {now}; of {counts.n} samples {counts.lost} lost and "
        f"{counts.gained} gained, p = {line.p:.3g}; bits and bytes before and now: "
        f"{line.bits[0]}, {line.bits[1]}; {line.nbytes[0]}, {line.nbytes[1]}"
    )
