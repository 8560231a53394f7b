from __future__ import annotations

import json
from pathlib import Path

from tools.gpu import report
from tools.gpu.report import markdown

ROOT = Path(__file__).resolve().parents[2]


def stage(**written):
    return {"status": "passed", "seconds": 1.5, "limit": 5, "written": written}


RESULTS = {
    "command": "python tools/gpu_check.py --out out",
    "device": "cuda",
    "bundle": {"commit": "abc"},
    "stages": {
        "environment": stage(
            environment={
                "card": "NVIDIA H100, 580",
                "python": "3.12.3",
                "cores": 16,
                "versions": {"torch": "2.11.0", "fvcore": None},
                "commit": None,
                "build_info": {
                    "torch_version": "2.14.1", "cuda_version": "13.0", "cuda_archs": ["sm_90"],
                },
            }
        ),
        "tests": stage(tests={"summary": ["9 passed, 0 failed, 0 skipped"]}),
        "operators": stage(
            operators_gpu={
                "records": [
                    {
                        "case": {"name": "p3_rows_bfloat16_2"},
                        "median_ms": {"pcka": 0.25, "pcka graph": 0.15, "eager": 0.7},
                        "figures": {"GB/s": 300.0, "% of copy": 10.0, "pcka (MiB)": 125.0},
                        "launches": {
                            "pcka": [
                                {"kernel": "mix<a|b>", "count": 2.0, "microseconds": 30.0},
                                {"kernel": "gemm", "count": 3.0, "microseconds": 20.0},
                            ]
                        },
                    }
                ]
            }
        ),
        "ncu": stage(ncu={"kernels": [{"kernel": "mix<a>", "ns": 12000.0, "bytes": 1e6}]}),
        "detector": stage(
            detection_step={
                "records": [
                    {
                        "size": "800 x 1333",
                        "batch": 2,
                        "steps": {
                            "student step": {"ms": [30.0, 32.0, 31.0], "peak_bytes": None},
                            "teacher forward": {"ms": [9.0], "peak_bytes": 1 << 20},
                            "PCKA": {"ms": [44.0], "peak_bytes": 1 << 30},
                        },
                    }
                ]
            }
        ),
    },
}  # fmt: skip


def test_every_table_says_what_was_measured_and_with_what():
    lines = markdown(RESULTS).splitlines()
    for line in (
        "- card, driver, memory, clocks, power limit: NVIDIA H100, 580",
        "- operators: torch 2.14.1, CUDA 13.0, sm_90",
        "- software: Python 3.12.3, torch 2.11.0",
        "- commit: abc",
        "- command: `python tools/gpu_check.py --out out`",
        "| tests | passed | 2 | 5 |",
        "- 9 passed, 0 failed, 0 skipped",
        "| p3_rows_bfloat16_2 | 0.25 / 0.15 | 0.7 | - | - | - | 300 | 10 | 125 | - | 5 | - |",
        "| mix<a\\|b> | 2 | 30.0 |",
        "| mix<a> | 1.2e+04 | 1e+06 |",
        "| 800 x 1333, batch 2: student step | 31.0 | 0.775 | - |",
        "| 800 x 1333, batch 2: PCKA | 44.0 | 1.100 | 1024 |",
    ):
        assert line in lines, line


def test_a_run_that_ended_early_has_a_report_all_the_same():
    text = markdown({**RESULTS, "stages": {"environment": {**stage(), "status": "failed"}}})
    assert "| environment | failed | 2 | 5 |" in text
    assert "## " not in text


def test_a_stage_without_a_table_says_what_it_says_in_the_summary():
    stages = {"training": stage(run={"summary": ["91.2 %", "40 s"]}, other=[1])}
    assert "## Training\n\n- 91.2 %\n- 40 s" in markdown({**RESULTS, "stages": stages})


def test_the_table_in_the_docs_is_that_of_the_figures():
    results = json.loads((ROOT / "benchmarks" / "results" / "h200.json").read_text())
    (table,) = [part(results) for t, part in report.TABLES["operators"].items() if "graph" in t]
    assert table.count("\n") > 5
    assert table in (ROOT / "docs" / "kernels.md").read_text()
