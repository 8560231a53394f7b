from __future__ import annotations

import json
import time

import pytest

from tools.gpu import runner
from tools.gpu.runner import Runner, summary
from tools.gpu.stages import Stage

MODULE = """
import json, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
(folder / "found.json").write_text(json.dumps({"arguments": sys.argv[1:], "summary": ["a line"]}))
(folder / "kept.txt").write_text("kept")
print("said something")
"""


@pytest.fixture
def run(tmp_path):
    """Runs stages whose modules have this code after MODULE; the folder of results, and the run."""

    def run(codes, stages, device="cuda"):
        for name, code in codes.items():
            (tmp_path / f"stage_{name}.py").write_text(MODULE + code)
        out = tmp_path / "out"
        out.mkdir()
        made = Runner(
            out, tmp_path / "work", device, quick=True, environment={"PYTHONPATH": str(tmp_path)}
        )
        return made, made.run(stages)

    return run


def stage(name, seconds=30, **options):
    return Stage(name, f"stage_{name}", seconds, **options)


def test_a_stage_that_fails_or_hangs_leaves_what_it_wrote_and_the_next_one_runs(run, tmp_path):
    codes = {"bad": "sys.exit(1)", "late": "time.sleep(60)", "good": ""}
    began = time.monotonic()
    made, complete = run(
        codes, [stage("bad"), stage("late", 2), stage("good", files=("kept.txt",))]
    )
    assert complete and time.monotonic() - began < 30
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: entry["status"] for name, entry in written["stages"].items()} == {
        "bad": "failed", "late": "timed out", "good": "passed",
    }  # fmt: skip
    assert made.failed == ["bad", "late"]
    for entry in written["stages"].values():
        assert entry["written"]["found"]["summary"] == ["a line"]
    given = written["stages"]["good"]["written"]["found"]["arguments"]
    assert given[2:] == ["--device", "cuda", "--quick"]
    assert (tmp_path / "out" / "kept.txt").read_text() == "kept"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("said something") == 3 and "===== late: timed out" in log


def test_a_needed_stage_that_fails_ends_the_run(run):
    made, complete = run({"needed": "sys.exit(1)"}, [stage("needed", needed=True), stage("next")])
    assert not complete
    assert list(made.results["stages"]) == ["needed"]


def test_a_stopped_stage_takes_what_it_started_along(run, tmp_path):
    child = "import time; time.sleep(2); open({!r}, 'w')".format(str(tmp_path / "survived"))
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    run({"late": f"{start}; time.sleep(60)", "left": start}, [stage("late", 1), stage("left")])
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def test_neighbours_run_at_the_same_time_and_each_has_its_own_time(run, tmp_path):
    meet = """
mine, other = (folder.parent / ("met_" + name) for name in (folder.name, {!r}))
mine.write_text("")
while not other.exists():
    time.sleep(0.05)
"""
    codes = {"a": meet.format("b"), "b": meet.format("a") + "time.sleep(2)"}
    made, _ = run(codes, [stage("a", alone=False), stage("b", alone=False)])
    assert made.failed == []
    times = [entry["seconds"] for entry in made.results["stages"].values()]
    assert sorted(times)[0] + 1 < sorted(times)[1]


def test_a_rehearsal_on_a_cpu_has_more_patience(run):
    made, _ = run({"slow": "time.sleep(2)"}, [stage("slow", 1)], device="cpu")
    assert made.failed == []
    assert made.results["stages"]["slow"]["limit"] == runner.PATIENCE


def test_in_the_summary_every_stage_has_its_share_of_the_lines():
    lengths = {"short": 2, "long": 40, "longer": 80}
    stages = {
        name: {
            "status": "passed",
            "seconds": 1.0,
            "limit": 5,
            "written": {"x": {"summary": [f"line {i}" for i in range(length)]}, "y": [1]},
        }
        for name, length in lengths.items()
    }
    lines = summary({"command": "c", "device": "cuda", "stages": stages})
    assert len(lines) == 60
    assert lines[:2] == ["c on cuda", "short: passed after 1.0 s of 5"]
    assert lines[4:7] == ["[short] line 0", "[short] line 1", "[long] line 0"]
    assert [line for line in lines if "more lines" in line] == [
        "(14 more lines are in results.json)", "(54 more lines are in results.json)",
    ]  # fmt: skip
    few = {"command": "c", "device": "cpu", "stages": {"short": stages["short"]}}
    assert len(summary(few)) == 4
