"""What compute-sanitizer, Nsight Compute and pytest say is read right."""

from __future__ import annotations

import os
import sys

from tools.gpu import ncu, sanitizer, tests

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void pcka::<unnamed>::patchify_kernel<float, float>(const float *)+0x1f0
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========         Host Frame: pcka::patchify at patchify.cu:12 [0x1234] in _cuda.abi3.so
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void cutlass::Kernel2<gemm>(T1::Params)+0x530
=========     by thread (3,0,0) in block (0,0,0)
=========         Host Frame: pcka::multiply [0x1234] in _cpu.abi3.so
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void pcka::<unnamed>::mix_kernel<T>()+0x10
=========     and Read access at void pcka::<unnamed>::mix_kernel<float>()+0x80 [64 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_errors_are_counted_by_whose_kernel_they_are_in():
    assert sanitizer.read(MEMCHECK) == {"own": 1, "other": 1, "finished": True}
    assert sanitizer.read(RACECHECK) == {"own": 1, "other": 0, "finished": True}
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.read(clean) == {"own": 0, "other": 0, "finished": True}
    assert sanitizer.read("========= COMPUTE-SANITIZER\n")["finished"] is False
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitizer.read(clean) == {"own": 0, "other": 0, "finished": True}


COUNTERS = """\
==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","12","void pcka::<unnamed>::mix_kernel<float, int>(T1 *)","gpu__time_duration.sum","nsecond","12,345"
"0","12","void pcka::<unnamed>::mix_kernel<float, int>(T1 *)","dram__bytes.sum","byte","1,000,000"
"1","12","pcka::(anonymous namespace)::plain_kernel(T1 *)","gpu__time_duration.sum","nsecond","7.5"
"""  # noqa: E501


def test_counters_are_read_by_launch():
    assert ncu.read(COUNTERS) == [
        {"kernel": "mix_kernel<float, int>", "ns": 12345.0, "bytes": 1e6},
        {"kernel": "plain_kernel", "ns": 7.5},
    ]
    assert ncu.read("==ERROR== ERR_NVGPUCTRPERM") == []


JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase name="good"/>
<testcase name="bad"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase name="broken"><error message="boom">text</error></testcase>
<testcase name="left"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_named(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT)
    counted = tests.count(tmp_path / "tests.xml")
    assert counted["passed"] == 1
    assert counted["failed"] == ["bad: assert 1 == 2", "broken: boom"]
    assert counted["skipped"] == ["left: no GPU"]
    assert tests.summary(counted)[0] == "1 passed, 2 failed, 1 skipped"


SLOW = """
import time

def test_quick():
    pass

def test_endless():
    time.sleep(60)
"""


def test_tests_that_do_not_end_are_stopped_and_the_others_reported(tmp_path):
    (tmp_path / "test_slow.py").write_text(SLOW)
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command += [str(tmp_path / "test_slow.py"), f"--junitxml={report}"]
    assert not tests.run(command, 5)
    counted = tests.count(report)
    assert counted["passed"] >= 1 and not counted["failed"]
    counted["stopped"] = "stopped after 5 s"
    assert tests.summary(counted)[1] == "stopped after 5 s"
