from __future__ import annotations

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from pcka.checkpoint import (
    ShapeMismatch,
    check_values,
    extract_state_dict,
    load_weights,
    save_student,
)
from pcka.distiller import Distiller
from pcka.files import CheckpointError, load_file


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


@pytest.mark.parametrize("part", ["module", "_orig_mod", "student", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "student.", "module.student._orig_mod."])
def test_a_part_of_the_model_that_is_called_like_a_prefix_keeps_its_name(part, prefix, tmp_path):
    saved, model = nn.ModuleDict({part: _model()}), nn.ModuleDict({part: _model()})
    torch.save(_prefixed(prefix, saved), tmp_path / "file.pth")
    report = load_weights(model, tmp_path / "file.pth")
    assert report.complete and report.layout == f"bare {prefix}*"
    assert _same(model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_loads_what_was_saved_of_it(wrap, tmp_path):
    save_student(wrap(STUDENT), tmp_path / "file.pth")
    model = _model()
    assert load_weights(wrap(model), tmp_path / "file.pth").complete
    assert _same(model.state_dict(), STUDENT.state_dict())


def test_role_picks_the_teacher(tmp_path):
    torch.save({"model": BOTH}, tmp_path / "file.pth")
    model = _model()
    load_weights(model, tmp_path / "file.pth", role="teacher")
    assert _same(model.state_dict(), TEACHER.state_dict())


def test_a_file_of_one_model_serves_either_role():
    assert _same(extract_state_dict(TEACHER.state_dict(), role="teacher"), TEACHER.state_dict())


def test_a_role_that_the_file_lacks_is_refused():
    with pytest.raises(CheckpointError, match="the file holds only student, got 'teacher'"):
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
    assert str(report).startswith("6 of 9 entries fit\n")
    assert torch.equal(model[0].weight, load_file(tmp_path / "file.pth")["0.weight"])
    assert torch.equal(model[3].weight, head)


def test_a_deeper_model_of_the_same_names_is_not_mistaken(tmp_path):
    torch.save(nn.Sequential(*_model(), nn.Linear(3, 3)).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"9 of 9 entries fit(.|\n)*2 unexpected: 4\.weight"):
        load_weights(_model(), tmp_path / "deep.pth")


def test_partial_means_at_least_something(tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="from another model"):
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


NO_WEIGHTS = {
    "has NaN or infinite values": lambda x: x * float("nan"),
    "has NaN or infinite values in torch.float32": lambda x: x.double().fill_(1e300),
    "is torch.int8": lambda x: x.to(torch.int8),
    "is torch.bool": lambda x: x > 0,
    "is torch.complex64": lambda x: x.to(torch.complex64),
    r"unsupported tensor \(torch.sparse_coo\)": lambda x: x.to_sparse(),
    r"unsupported tensor \(meta\)": lambda x: x.to("meta"),
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

    with pytest.raises(CheckpointError, match="only tensors, but _extra_state is something else"):
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


def test_save_student_writes_no_more_than_the_weights(tmp_path):
    student = nn.Linear(10, 10, bias=False)
    student.weight = nn.Parameter(torch.randn(1_000_000)[:100].view(10, 10))
    save_student(student, tmp_path / "student.pth")
    assert (tmp_path / "student.pth").stat().st_size < 10_000
