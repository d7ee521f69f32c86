"""Table IV from made-up rows: cells, ratios, CSV, the paper's figures, and foreign text."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.efficiency.request import TrialResult
from kvbench.efficiency.rows import ROWS, EfficiencyRow, make_row
from kvbench.errors import UserError
from kvbench.report.efficiency import efficiency_blocks
from kvbench.report.efficiency_paper import paper_efficiency
from kvbench.report.efficiency_tables import efficiency_text, table4_csv, table4_markdown
from kvbench.report.write import EFFICIENCY, write_report
from tests.efficiency.made_up import SETTING

GIB = 1 << 30
LABELS = {"fp16": "FP16", "akvq_vl": "AKVQ-VL", "kivi": "KIVI", "hf_dynamic": "HF DynamicCache"}


def efficiency_row(
    method: str = "fp16",
    batch: int = 10,
    seconds: float = 2.0,
    result: dict[str, Any] | None = None,
    **changes: Any,
) -> EfficiencyRow:
    """A row of `batch` rows whose run took `seconds`, half of them for prompts."""
    base = method.partition("[")[0]
    runner = "generate" if base.startswith("hf_") else "engine"
    setting = replace(
        SETTING,
        method=method,
        label=LABELS.get(base, base),
        runner=runner,
        **{"output_tokens": 11, "gpu_label": "4 cards", **changes},
    )
    made = TrialResult(
        "ok",
        path="graph" if runner == "engine" else "generate",
        peak_nvml=batch * GIB,
        peak_torch=batch * GIB - GIB // 2,
        cache_bytes=batch * GIB // 2,
        weight_bytes=2 * GIB,
        vision_bytes=GIB,
        workspace_bytes=GIB // 4,
        activation_bytes=GIB // 8,
        ttft_s=seconds / 2,
        tpot_s=(seconds / 20,) * 9 + (seconds / 10,),
        decode_s=seconds / 2,
        total_s=seconds,
        bytes_per_step=3.0 * GIB,
        flops_per_step=1e9,
        copy_bandwidth=1e12,
        matmul_rate=1e14,
    )
    changed = result or {}
    made = replace(made, **changed) if "status" not in changed else TrialResult(**changed)
    tried = {"out_of_memory_at": batch + 1, "tries": 5}
    told = {"machine": "Linux", "command": "kvbench efficiency --gpu v100", "time": "2026-01-01"}
    return make_row(setting, made, batch=batch if made.status == "ok" else 0, **tried, **told)


def small_run() -> list[EfficiencyRow]:
    return [
        efficiency_row("hf_dynamic", 9, 8.0),
        efficiency_row("akvq_vl", 40, 4.0),
        efficiency_row("fp16", 10, 2.0),
        efficiency_row("kivi", 0, result={"status": "failed", "detail": "it <broke>"}),
        efficiency_row("akvq_vl", 4, 1.0, fixed_batch=4),
        efficiency_row("fp16", 4, 2.0, fixed_batch=4, result={"peak_nvml": 12 * GIB}),
        efficiency_row("fp16", 2, 1.0, fixed_batch=2),
    ]


def times(value: float) -> str:
    return f"{value:.2f}\N{MULTIPLICATION SIGN}"


def cells(markdown: str, title: str) -> list[list[str]]:
    """Rows of the table below a heading, its titles first."""
    lines = markdown.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [found[0], *found[2:]]


def test_the_largest_batches() -> None:
    titles, fp16, kivi, akvq, plain = cells(table4_markdown(small_run()), "Largest batch")
    assert titles[:8] == ["Method", "Basis", "Weights", "Path", "Batch", "Memory GiB", "Tokens/s",
                          "Decode tokens/s"]  # fmt: skip
    # 10 rows of 11 tokens in 2 s; 10 rows of 10 tokens in 1 s.
    assert fp16 == ["FP16", "emulated", "random", "graph", "10", "10.00", "55", "100", "1.00",
                    "100.00", "155.00", "5.00", times(1.00), times(1.00), times(1.00), times(1.11),
                    times(4.44)]  # fmt: skip
    assert kivi[:7] == ["KIVI", "emulated", "-", "-", "failed", "-", "-"]
    assert akvq[4:] == ["40", "40.00", "110", "200", "2.00", "200.00", "310.00", "20.00",
                        times(4), times(2), times(2), times(4.44), times(8.89)]  # fmt: skip
    assert plain[:4] == ["HF DynamicCache", "emulated", "random", "generate"]
    assert plain[-2:] == [times(1.00), times(1.00)]


def test_equal_batches_are_held_against_fp16_at_the_same_batch() -> None:
    titles, *lines = cells(table4_markdown(small_run()), "Equal batches")
    assert [(line[0], line[4]) for line in lines] == [
        ("FP16", "2"),
        ("FP16", "4"),
        ("AKVQ-VL", "4"),
    ]
    akvq = dict(zip(titles, lines[2], strict=True))
    assert akvq["FP16's memory over it"] == times(3.00)
    assert akvq["Tokens/s, of FP16"] == times(2.00)
    assert akvq["Tokens/s, of generate"] == "-"


def test_memory_and_steps_have_tables() -> None:
    markdown = table4_markdown(small_run())
    fp16 = cells(markdown, "Memory in GiB")[1]
    assert fp16 == ["FP16", "10", "2.00", "1.00", "0.12", "5.00", "0.25", "9.50", "10.00"]
    titles, step, *_ = cells(markdown, "Decode step")
    found = dict(zip(titles, step, strict=True))
    floor = 3 * GIB / 1e12  # weights and cache, as bytes outweigh products
    assert found["Floor ms"] == f"{1e3 * floor:.2f}"
    assert found["Step over floor"] == times(0.11 / floor)
    assert found["Of copy bandwidth"] == f"{100 * floor / 0.11:.0f} %"


def test_the_papers_table_stands_beside() -> None:
    assert paper_efficiency()["akvq_vl"].batch == 130
    table = cells(table4_markdown(small_run()), "Beside the paper's Table IV")
    assert table[1] == ["FP16", "10", "40", "10.00", "63.08", "55", "1,028.38"]
    assert table[2] == ["AKVQ-VL", "40", "130", "40.00", "62.57", "110", "2,526.37"]
    assert len(table) == 3
    elsewhere = [efficiency_row("fp16", gpu="h100"), efficiency_row("fp16", model="other")]
    assert "Beside the paper" not in table4_markdown(elsewhere)


def test_the_header_says_how_it_was_made() -> None:
    markdown = table4_markdown(small_run())
    for line in (
        "- card: 4 cards, emulated memory: measured on another card, held to this one's memory",
        "- memory limit in GiB: 64.00",
        "- computed on: NVIDIA H100 80GB HBM3",
        "- versions: torch 2.11",
        "- machine: Linux",
        "- command: `kvbench efficiency --gpu v100`",
    ):
        assert line in markdown.splitlines()
    assert "- KIVI: failed; it &lt;broke&gt;" in markdown


def test_other_settings_are_other_blocks() -> None:
    rows = [*small_run(), efficiency_row(memory="modelled"), efficiency_row(input_tokens=4000)]
    assert len(efficiency_blocks(rows)) == 3
    assert len(efficiency_blocks(small_run())) == 1


def test_a_bound_is_not_a_measurement() -> None:
    bound = {"path": "bound", "copy_bandwidth": None, "bytes_per_step": None}
    rows = [
        efficiency_row(method, batch, memory="modelled", device="", result=bound)
        for method, batch in (("fp16", 10), ("akvq_vl", 40))
    ]
    markdown = table4_markdown(rows)
    akvq = cells(markdown, "Largest batch")[2]
    assert akvq[1:4] == ["modelled", "random", "bound"]
    assert akvq[6] == "≤ 220" and akvq[8] == "≥ 1.00"
    assert akvq[12:15] == [times(4.00), "-", "-"], "batches are compared, bounds of speed aren't"
    assert "- computed on: no card" in markdown
    assert "### Decode step" not in markdown


def test_no_driver_no_process_memory() -> None:
    row = efficiency_row(result={"peak_nvml": None})
    assert cells(table4_markdown([row]), "Largest batch")[1][5] == "9.50"


def test_an_eager_path_has_its_reason_below() -> None:
    row = efficiency_row("kivi", result={"path": "eager: its window | breaks"})
    markdown = table4_markdown([row])
    assert cells(markdown, "Largest batch")[1][3] == "eager"
    assert "- KIVI: eager: its window \\| breaks" in markdown


def test_csv_has_the_rows_numbers() -> None:
    rows = small_run()
    lines = list(csv.DictReader(table4_csv(rows).splitlines()))
    assert len(lines) == len(rows)
    by_place = {(row.method, str(row.fixed_batch or "")): row for row in rows}
    for line in lines:
        row = by_place[line["method"], line["fixed_batch"]]
        for name in ("peak_nvml", "cache_bytes", "throughput", "tpot_p95_s", "ttft_s", "batch"):
            value = getattr(row, name)
            assert (float(line[name]) if line[name] else None) == (
                None if value is None else pytest.approx(value, rel=1e-9)
            )
        assert (line["memory"], line["gpu"], line["code"]) == ("emulated", "v100", "c0de")
    akvq = next(li for li in lines if li["method"] == "akvq_vl" and not li["fixed_batch"])
    assert float(akvq["batch_over_fp16"]) == 4
    assert float(akvq["throughput_over_generate"]) == pytest.approx(110 / (99 / 8))
    assert akvq["paper_batch"] == "130"


def test_rows_in_any_order_give_the_same() -> None:
    rows = small_run()
    assert table4_markdown(rows) == table4_markdown(rows[::-1])
    assert table4_csv(rows) == table4_csv(rows[::-1])


def test_labels_are_not_taken_for_markup() -> None:
    odd = efficiency_row("akvq_vl[x=|`<b>\x1b[2J]", model_label="*m*", gpu_label="<i>$x$</i>")
    markdown = table4_markdown([odd])
    assert "## \\*m\\*, &lt;i&gt;\\$x\\$&lt;/i&gt; (emulated)" in markdown
    assert "AKVQ-VL [x=\\|\\`&lt;b&gt; [2J]" in markdown
    assert "\x1b" not in markdown + efficiency_text([odd]) + table4_csv([odd])


def test_the_terminal_has_the_main_figures() -> None:
    lines = efficiency_text(small_run()).splitlines()
    assert lines[1] == "LLaVA-v1.5-7B, 4 cards (emulated), 600 tokens in, 11 out"
    akvq = next(line for line in lines if line.startswith("AKVQ-VL"))
    assert akvq.split()[1:5] == ["graph", "40", "40.00", "110"]


def store(folder: Path, rows: list[EfficiencyRow]) -> None:
    (folder / ROWS).write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def test_a_folder_of_efficiency_rows_is_reported(tmp_path: Path) -> None:
    assert EFFICIENCY == ROWS
    store(tmp_path, small_run())
    written = write_report(tmp_path)
    assert [path.name for path in written] == [
        "table4.md", "table4.csv", "figure9.svg", "figure9.png", "throughput.svg", "throughput.png",
    ]  # fmt: skip
    assert (tmp_path / "table4.md").read_text() == table4_markdown(small_run())
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_a_folder_of_both_kinds(tmp_path: Path, small_run: list[Any]) -> None:
    store(tmp_path, [efficiency_row()])
    lines = [row.to_json() + "\n" for row in small_run]
    (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    names = {path.name for path in write_report(tmp_path)}
    assert {"table2.md", "details.md", "table4.md", "figure9.svg"} <= names


@pytest.mark.parametrize("content", ["", '{"schema'])
def test_no_results_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / ROWS).write_text(content)
    with pytest.raises(UserError, match="no results yet: run kvbench efficiency"):
        write_report(tmp_path)


def test_a_broken_row_is_said(tmp_path: Path) -> None:
    broken = json.loads(efficiency_row().to_json()) | {"batch": "many"}
    (tmp_path / ROWS).write_text(json.dumps(broken) + "\n")
    with pytest.raises(UserError, match=r"line 1: .*batch is 'many'"):
        write_report(tmp_path)
