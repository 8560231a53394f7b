from __future__ import annotations

import argparse
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

import pcka
from pcka.checkpoint import (
    CheckpointError,
    ShapeMismatch,
    atomic_save,
    check_values,
    extract_state_dict,
    load_file,
    load_weights,
    save_student,
)
from pcka.distiller import Distiller

REPOSITORY = Path(pcka.__file__).parents[1]


def _model(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def _prefixed(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def _same_content(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whatever the order, of which safetensors makes its own."""
    return _same(dict(sorted(one.items())), dict(sorted(other.items())))


STUDENT, TEACHER = _model(), _model()
BOTH = {
    **_prefixed("module.student.", STUDENT),
    **_prefixed("module.teacher.", TEACHER),
    "module.connector.weight": torch.ones(1),
}
LAYOUTS = {
    "bare *": STUDENT.state_dict(),
    "bare module.*": _prefixed("module.", STUDENT),
    "bare module._orig_mod.*": _prefixed("module._orig_mod.", STUDENT),
    "['model'] *": {"epoch": 240, "model": STUDENT.state_dict(), "optimizer": {"state": {}}},
    "['model'] module.student.*": {"model": BOTH, "best_acc": 71.5},
    "['state_dict'] module.*": {"state_dict": _prefixed("module.", STUDENT), "best_prec1": 93.6},
    "['model_state_dict'] *": {"epoch": 3, "model_state_dict": STUDENT.state_dict()},
    "['state_dict'] *": {"model": "resnet56", "state_dict": STUDENT.state_dict()},
    "['student'] *": {"student": STUDENT.state_dict(), "epoch": 3},
    "bare student._orig_mod.*": _prefixed("student._orig_mod.", STUDENT),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_load(layout, tmp_path):
    assert _same(extract_state_dict(LAYOUTS[layout]), STUDENT.state_dict())
    torch.save(LAYOUTS[layout], tmp_path / "file.pth")
    model = _model()
    report = load_weights(model, tmp_path / "file.pth")
    assert report.complete
    assert report.layout == layout
    assert report.loaded == tuple(STUDENT.state_dict())
    assert _same(model.state_dict(), STUDENT.state_dict())


def test_role_picks_the_teacher(tmp_path):
    torch.save({"model": BOTH}, tmp_path / "file.pth")
    model = _model()
    load_weights(model, tmp_path / "file.pth", role="teacher")
    assert _same(model.state_dict(), TEACHER.state_dict())


def test_a_file_of_one_model_serves_either_role():
    assert _same(extract_state_dict(TEACHER.state_dict(), role="teacher"), TEACHER.state_dict())


def test_a_role_that_the_file_lacks_is_refused():
    with pytest.raises(CheckpointError, match="the file holds student alone, got 'teacher'"):
        extract_state_dict(_prefixed("student.", STUDENT), role="teacher")


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role: expected one of student, teacher, got 'pupil'"):
        extract_state_dict({}, role="pupil")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "model": {"lr": 0.1}}, "'epoch': int, 'model': dict"),
        ([1, 2], "got list"),
        ({}, "got a dict of"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(content, found, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=found) as caught:
        load_weights(_model(), tmp_path / "file.pth")
    assert "file.pth" in str(caught.value)


def _misfit() -> dict[str, Tensor]:
    """Weights for five classes instead of three, without conv bias, with an extra entry."""
    state = {**_model(classes=5).state_dict(), "extra.weight": torch.ones(2)}
    del state["0.bias"]
    return state


def test_a_misfit_is_refused_with_its_lists_and_changes_nothing(tmp_path):
    torch.save(_misfit(), tmp_path / "file.pth")
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "file.pth")
    message = str(caught.value)
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "2 mismatched: 3.weight (5, 4) for (3, 4), 3.bias (5,) for (3,)" in message
    assert "allow_partial=True" in message
    assert _same(model.state_dict(), before)


def test_allow_partial_loads_what_fits_and_reports_the_rest(tmp_path):
    torch.save(_misfit(), tmp_path / "file.pth")
    model = _model()
    head = model[3].weight.clone()
    report = load_weights(model, tmp_path / "file.pth", allow_partial=True)
    assert not report.complete
    assert report.loaded == ("0.weight", *(name for name in model.state_dict() if name[0] == "1"))
    assert report.missing == ("0.bias",)
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched[0] == ShapeMismatch("3.weight", (5, 4), (3, 4))
    assert str(report).startswith("6 of 9 entries")
    assert torch.equal(model[0].weight, load_file(tmp_path / "file.pth")["0.weight"])
    assert torch.equal(model[3].weight, head)


def test_a_deeper_model_of_the_same_names_is_not_mistaken(tmp_path):
    torch.save(nn.Sequential(*_model(), nn.Linear(3, 3)).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"9 of 9 entries fit(.|\n)*2 unexpected: 4\.weight"):
        load_weights(_model(), tmp_path / "deep.pth")


def test_partial_means_at_least_something(tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="another model's"):
        load_weights(_model(), tmp_path / "file.pth", allow_partial=True)


def test_old_files_lack_num_batches_tracked(tmp_path):
    state = STUDENT.state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    report = load_weights(_model(), tmp_path / "old.pth")
    assert report.complete
    assert str(report).startswith("8 of 8 entries")


def test_weights_take_the_dtype_of_the_model(tmp_path):
    torch.save(STUDENT.state_dict(), tmp_path / "file.pth")
    model = _model().double()
    load_weights(model, tmp_path / "file.pth")
    assert torch.equal(model[0].weight, STUDENT[0].weight.double())


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


PICKLED = {
    "argparse.Namespace": {"opt": argparse.Namespace(lr=0.1), "model": STUDENT.state_dict()},
    "multiarray.scalar": {"best_acc": np.float64(71.5), "state_dict": STUDENT.state_dict()},
    "modules.container": STUDENT,
    "container.Sequential": {"model": STUDENT, "epoch": 240},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("found", PICKLED)
def test_a_pickled_object_is_refused_with_the_way_out(found, zipped, tmp_path, monkeypatch):
    path = tmp_path / "resnet_last.pth"
    torch.save(PICKLED[found], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{found}.*trust") as caught:
        load_file(path)
    way_out = re.search(r'python -c "(.*)"', str(caught.value))[1]
    monkeypatch.chdir(tmp_path)
    exec(way_out, {})
    assert load_weights(_model(), tmp_path / "weights.pth").complete


def test_a_malicious_pickle_is_not_executed(tmp_path):
    path, marker = tmp_path / "file.pth", tmp_path / "executed"
    torch.save({"model": STUDENT.state_dict(), "opt": _Exploit(marker)}, path)
    with pytest.raises(CheckpointError, match="open"):
        load_weights(_model(), path)
    assert not marker.exists()
    torch.load(path, weights_only=False)["opt"].close()
    assert marker.exists(), "the file was harmless, so the test has shown nothing"


def _truncated(path: Path) -> bytes:
    torch.save(torch.ones(10_000), path)
    return path.read_bytes()[:20_000]


@pytest.mark.parametrize("make", [lambda _: b"", lambda _: b"Copyright", _truncated])
def test_a_damaged_file_is_named(make, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(make(path))
    with pytest.raises(CheckpointError, match=r"file\.pth' is damaged"):
        load_file(path)


def _same_tree(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_tree(one[k], other[k]) for k in one)
    return one == other


def _checkpoint() -> dict[str, object]:
    """A student and its momentum, large enough that most bytes are of tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    momentum = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return {"epoch": 3, "model": model.state_dict(), "momentum": momentum}


@pytest.mark.parametrize(("content", "flips"), [(_checkpoint()["model"], 200), (_checkpoint(), 60)])
def test_a_flipped_bit_is_refused_or_changes_nothing(content, flips, tmp_path):
    """No checksum covers the padding between entries and the times of the archive."""
    path, chance = tmp_path / "file.pth", random.Random(0)
    torch.save(content, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _same_tree(load_file(path), content)
        except CheckpointError as error:
            assert "file.pth' is damaged" in str(error)
            refused += 1
    assert refused >= 0.97 * flips


def test_a_file_written_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STUDENT.state_dict(), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert _same(load_file(tmp_path / "file.pth"), STUDENT.state_dict())


NO_WEIGHTS = {
    "has NaN or infinite values": lambda x: x * float("nan"),
    "has NaN or infinite values in torch.float32": lambda x: x.double().fill_(1e300),
    "is torch.int8": lambda x: x.to(torch.int8),
    "is torch.bool": lambda x: x > 0,
    "is torch.complex64": lambda x: x.to(torch.complex64),
    r"another kind \(torch.sparse_coo\)": lambda x: x.to_sparse(),
    r"another kind \(meta\)": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("fault", NO_WEIGHTS)
@pytest.mark.parametrize("allow_partial", [False, True])
def test_what_is_no_weight_is_refused_with_file_and_entry(fault, allow_partial, tmp_path):
    state = STUDENT.state_dict()
    state["3.weight"] = NO_WEIGHTS[fault](state["3.weight"])
    torch.save(state, tmp_path / "file.pth")
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"file\.pth': 1 of 9 .*: 3\.weight .*{fault}"):
        load_weights(model, tmp_path / "file.pth", allow_partial=allow_partial)
    assert _same(model.state_dict(), before)


def test_a_negative_variance_is_refused():
    state = {"norm.running_var": torch.tensor([1.0, -0.1]), "norm.running_mean": -torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"1 of 2 .* norm\.running_var has negative"):
        check_values(state, state)


def test_infinities_that_the_model_has_itself_are_no_fault():
    mask = torch.full((2, 2), -torch.inf).triu(1)
    check_values({"mask": mask, "count": torch.tensor(3)}, {"mask": mask, "count": torch.tensor(0)})


def test_an_absent_file_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_file(tmp_path / "none.pth")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file.pth"
    atomic_save({"generation": 1}, path)
    with pytest.raises(AttributeError):
        atomic_save(lambda: None, path)
    assert load_file(path) == {"generation": 1}
    assert list(path.parent.iterdir()) == [path]


GENERATION_BYTES = 2**26  # takes long enough to write that the kill lands in the midst of it
SAVE_FOR_EVER = f"""
import itertools, sys, torch
from pcka.checkpoint import atomic_save
for generation in itertools.count(1):
    atomic_save({{"w": torch.full(({GENERATION_BYTES // 4},), float(generation))}}, sys.argv[1])
"""
KILL_BEFORE_REPLACE = """
import os, signal, sys, torch
from pcka.checkpoint import atomic_save
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
atomic_save({"w": torch.ones(1000)}, sys.argv[1])
"""


def _start(script: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=REPOSITORY)


def _leftovers(path: Path) -> list[Path]:
    return [other for other in path.parent.iterdir() if other != path]


def _wait_until_written(path: Path, size: int) -> None:
    """Return while a save is under way that has written `size` bytes."""
    while True:
        for temporary in _leftovers(path):
            try:
                if temporary.stat().st_size >= size:
                    return
            except FileNotFoundError:  # it has just become the checkpoint
                continue


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_kill_during_a_save_leaves_a_whole_file(fraction, tmp_path):
    path = tmp_path / "checkpoint.pth"
    atomic_save({"w": torch.zeros(1)}, path)
    process = _start(SAVE_FOR_EVER, path)
    try:
        _wait_until_written(path, int(fraction * GENERATION_BYTES))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    weights = load_file(path)["w"]
    assert weights.numel() in (1, GENERATION_BYTES // 4)
    assert weights.min() == weights.max()


def test_a_disk_that_is_full_is_told_with_the_path(tmp_path):
    path = tmp_path / "model.pth"
    atomic_save({"a": 1}, path)
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large; not written: '.*model\.pth'"):
            atomic_save({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_last_step_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    atomic_save({"generation": 1}, path)
    assert _start(KILL_BEFORE_REPLACE, path).wait() == -signal.SIGKILL
    assert load_file(path) == {"generation": 1}

    [leftover] = _leftovers(path)
    assert leftover.name.startswith(".")
    assert leftover.suffix == ".tmp"
    assert list(tmp_path.glob("*.pth")) == [path]

    atomic_save({"generation": 2}, path)
    assert load_file(path) == {"generation": 2}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda student: student,
        nn.DataParallel,
        lambda student: Distiller(student, TEACHER, []),
        pytest.param(torch.compile, marks=pytest.mark.slow),
    ],
)
def test_save_student_gives_what_a_plain_constructor_loads(wrap, tmp_path):
    student = _model()
    save_student(wrap(student), tmp_path / "student.pth")
    fresh = _model()
    fresh.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True))
    assert _same(fresh.state_dict(), student.state_dict())


@pytest.mark.parametrize("other", ["head", "teacher", "losses"])
def test_save_student_of_a_model_with_a_part_called_student_writes_all_of_it(other, tmp_path):
    model = nn.ModuleDict({"student": _model(), other: nn.Linear(3, 2)})
    save_student(model, tmp_path / "student.pth")
    assert _same(torch.load(tmp_path / "student.pth"), model.state_dict())


def test_save_student_refuses_a_state_that_is_no_tensor(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

    with pytest.raises(CheckpointError, match="tensors alone, and _extra_state is something else"):
        save_student(Stateful(2, 2), tmp_path / "student.pth")


@pytest.mark.parametrize("layout", ["bare *", "bare module.*", "bare student._orig_mod.*"])
def test_safetensors_load_in_any_layout(layout, tmp_path):
    copies = {name: tensor.clone() for name, tensor in LAYOUTS[layout].items()}
    safetensors.save_file(copies, tmp_path / "file.safetensors")
    model = _model()
    report = load_weights(model, tmp_path / "file.safetensors")
    assert report.complete and report.layout == layout
    assert _same_content(model.state_dict(), STUDENT.state_dict())


def test_save_student_writes_safetensors_that_others_read(tmp_path):
    student = _model().to(memory_format=torch.channels_last)
    save_student(student, tmp_path / "student.safetensors")
    read = safetensors.load_file(tmp_path / "student.safetensors")
    assert _same_content(read, student.state_dict())


def test_a_damaged_safetensors_file_is_named(tmp_path):
    path = tmp_path / "file.safetensors"
    torch.save(STUDENT.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"file of safetensors, .*file\.safetensors' is dam"):
        load_file(path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (load_file, lambda path: save_student(STUDENT, path)):
        with pytest.raises(ImportError, match=r"safetensors is not installed; .*pcka\[export\]"):
            use(tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_student_writes_no_more_than_the_weights(tmp_path):
    student = nn.Linear(10, 10, bias=False)
    student.weight = nn.Parameter(torch.randn(1_000_000)[:100].view(10, 10))
    save_student(student, tmp_path / "student.pth")
    assert (tmp_path / "student.pth").stat().st_size < 10_000
