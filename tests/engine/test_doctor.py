from __future__ import annotations

import logging
import sys
import warnings

import pytest
import torch

import pcka
from pcka.engine import doctor
from pcka.engine.doctor import (
    FAIL,
    PASS,
    SKIP,
    WARN,
    Finding,
    Verdict,
    conclude,
    examine,
    needing,
    runs_on,
    screen,
    telling,
)


def test_what_a_check_raises_is_its_verdict():
    def refuses() -> Verdict:
        raise ValueError("DATA.ROOT: one\nline")

    def breaks() -> Verdict:
        raise KeyError("x")

    found = examine([("a", refuses), ("b", breaks), ("c", lambda: Verdict(PASS, "well"))])
    assert found == [
        Finding("a", FAIL, "DATA.ROOT: one line"),
        Finding("b", FAIL, "KeyError: 'x'"),
        Finding("c", PASS, "well"),
    ]


def test_the_screen_has_a_column_of_texts_that_fit_it():
    lines = screen([Finding("a", PASS, "short"), Finding("longer", FAIL, "word " * 60)]).split("\n")
    assert lines[0] == "ok    a       short"
    assert lines[1].startswith("FAIL  longer  word word")
    assert len(lines) > 3 and all(len(line) <= 100 for line in lines)
    assert all(line.startswith(" " * 14 + "word") for line in lines[2:])


def test_a_screen_ends_with_its_sum_and_the_status(capsys):
    well, doubtful = (lambda: Verdict(PASS, "well")), (lambda: Verdict(WARN, "hm"))
    assert conclude([("a", well), ("b", doubtful)]) == [("a", PASS, "well"), ("b", WARN, "hm")]
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 2 checks failed, 1 warned"
    with pytest.raises(SystemExit) as end:
        conclude([("a", well), ("b", lambda: Verdict(FAIL, "no"))])
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 2 checks failed, 0 warned"


def test_a_check_is_made_where_what_it_needs_was_found():
    found: list[int | None] = [None]
    check = needing("data", lambda: found[0], lambda: Verdict(PASS, "well"))
    assert check() == (SKIP, "skipped: needs the data")
    found[0] = 1
    assert check() == (PASS, "well")


@pytest.mark.parametrize(("status", "expected"), [(PASS, WARN), (FAIL, FAIL), (SKIP, SKIP)])
def test_what_a_training_would_warn_of_is_told_and_shown_nowhere_else(
    status, expected, caplog, recwarn
):
    log = logging.getLogger("pcka.doctors_test")

    def check() -> Verdict:
        log.warning("of %s", "the log")
        log.info("nothing")
        warnings.warn("of Python", UserWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
        return Verdict(status, "found")

    assert telling(check, log, UserWarning)() == (expected, "found; of the log; of Python")
    assert not caplog.messages and not recwarn.list
    assert log.propagate and not log.handlers
    assert telling(lambda: Verdict(PASS, "well"), log)() == (PASS, "well")


@pytest.mark.parametrize(
    ("arch", "capability", "expected"),
    [
        ("sm_80", (8, 6), True),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_120", (12, 0), True),
    ],
)
def test_code_runs_on_its_generation_from_its_own_number_on(arch, capability, expected):
    assert runs_on(arch, *capability) == expected


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of sm_90, and operators compiled for some architectures."""

    def pretend(**info: object) -> None:
        built = {**pcka.build_info(), "extension": True, "cuda_loaded": True, **info}
        monkeypatch.setattr(pcka, "build_info", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    return pretend


def test_operators_for_another_gpu_fail_with_the_command_that_builds_them(gpu):
    gpu(cuda_archs=["sm_80", "sm_86"])
    status, text = doctor.check_operators()
    assert status == FAIL
    assert "for sm_80, sm_86, the GPU is sm_90; TORCH_CUDA_ARCH_LIST=9.0 python setup.py" in text
    gpu(cuda_archs=["sm_80", "sm_90"])
    assert doctor.check_operators().status == PASS


def test_operators_that_are_not_in_use_warn_with_the_reason(gpu, monkeypatch):
    gpu(cuda_loaded=False, cuda_archs=["sm_90"], fallback={"cuda": "compiled by another torch"})
    status, text = doctor.check_operators()
    assert status == WARN and "compiled by another torch; python setup.py build_ext" in text
    gpu(extension=False, fallback={"cpu": "nothing is compiled"})
    status, text = doctor.check_operators()
    assert status == WARN and "nothing is compiled" in text


def test_a_missing_compiler_matters_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(pcka, "build_info", lambda: {"compiler": None})
    assert doctor.check_compiler() == Verdict(
        WARN, "none found; needed to compile the operators: install g++"
    )
    monkeypatch.setattr(pcka, "build_info", lambda: {"compiler": "g++ 12"})
    assert doctor.check_compiler().status == PASS


def test_a_detectron2_that_cannot_be_imported_is_named_with_its_repair(tmp_path, monkeypatch):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("import numpy\nnumpy.gone_in_this_version")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    status, text = doctor.check_detectron2()
    assert status == FAIL
    assert "gone_in_this_version" in text and "python tools/install_detectron2.py" in text


def test_a_missing_detectron2_fails_where_a_detector_needs_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert doctor.check_detectron2().status == PASS
    status, text = doctor.check_detectron2(needed=True)
    assert status == FAIL and "python tools/install_detectron2.py" in text
    checks = dict(doctor.machine_checks(for_detectors=True))
    assert checks["detectron2"]() == (status, text)


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    status, text = doctor.check_gpu()
    assert status == WARN and "this torch is a CPU-only build" in text
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    assert doctor.check_gpu().status == PASS


def test_a_run_needs_room_in_the_first_folder_that_is_there(tmp_path):
    assert doctor.check_disk(tmp_path / "not" / "yet", 1).status == PASS
    status, text = doctor.check_disk(tmp_path, 1 << 60)
    assert status == FAIL and "GiB free" in text and text.endswith("choose another OUTPUT_DIR")
    assert doctor.check_disk(tmp_path, 1 << 60, "go").text.endswith("; go")
