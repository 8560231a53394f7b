"""PKD, CWD and FitNet: losses of whole feature maps, position by position."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import (
    CWD,
    PCKA,
    PKD,
    Outputs,
    Patched,
    cwd_loss,
    fitnet_loss,
    patched_loss,
    pcka_loss,
    pkd_loss,
)

LOSSES = {"pkd": pkd_loss, "cwd": cwd_loss, "fitnet": fitnet_loss}
FITNET = partial(losses.FitNet, regressor=False)
MODULES = {"pkd": losses.PKD, "cwd": losses.CWD, "fitnet": FITNET}


@pytest.mark.parametrize("name", ["pkd", "cwd"])
def test_record_of_the_original_implementation(meets_record, name):
    meets_record(name, LOSSES[name])


def test_fitnet_is_the_mean_square(draw):
    student, teacher = draw(0, 2, 3, 5, 4), draw(1, 2, 3, 5, 4)
    expected = np.mean((student.numpy() - teacher.numpy()) ** 2)
    assert fitnet_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_pkd_does_not_see_scale_and_shift_of_a_channel(draw):
    teacher = draw(0, 2, 3, 5, 4)
    scale, shift = torch.rand(3, 1, 1).double() + 0.5, draw(1, 3, 1, 1)
    assert pkd_loss(scale * teacher + shift, teacher).item() == pytest.approx(0, abs=1e-9)


def test_cwd_does_not_see_the_shift_of_a_channel(draw):
    teacher = draw(0, 2, 3, 5, 4)
    assert cwd_loss(teacher + draw(1, 2, 3, 1, 1), teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_reaches_only_the_student(draw, name):
    student, teacher = draw(0, 2, 3, 5, 4).requires_grad_(), draw(1, 2, 3, 5, 4).requires_grad_()
    LOSSES[name](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_widened_first(draw, name, dtype):
    student, teacher = (draw(seed, 2, 3, 5, 4, scale=50).to(dtype) for seed in (0, 1))
    loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    exact = LOSSES[name](student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_module_weighs_each_stage(draw, name):
    student, teacher = (
        {level: draw(seed + i, 2, 3, 5, 4) for i, level in enumerate(("p3", "p4"))}
        for seed in (0, 10)
    )
    module = MODULES[name](stages=("p3", "p4"), weights=(2.0, 0.5))
    terms = module(Outputs(features=student), Outputs(features=teacher), None)
    for level, weight in (("p3", 2.0), ("p4", 0.5)):
        expected = weight * LOSSES[name](student[level], teacher[level])
        torch.testing.assert_close(terms[f"loss_{name}_{level}"], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_maps_of_other_shapes_are_refused(draw, name):
    with pytest.raises(ValueError, match=r"one shape \(B, C, H, W\).*\(2, 4, 5, 4\)"):
        LOSSES[name](draw(0, 2, 3, 5, 4), draw(1, 2, 4, 5, 4))


LOSSES_OF_PATCHES = {"pcka": pcka_loss, "patched": patched_loss}
MATCHING = {
    "pkd": PKD(weights=1.0),
    "cwd": CWD(weights=1.0),
    "fitnet": FITNET(weights=1.0),
    "pcka": PCKA(weights=1.0, patch_sizes=2),
    "patched": Patched(patch_sizes=2),
}


@pytest.mark.parametrize("name", MATCHING)
def test_modules_refuse_maps_of_other_shapes_and_name_who_adapts_them(draw, name):
    pair = (Outputs(features={"last": draw(i, 2, 3 + i, 8, 6)}) for i in (0, 1))
    message = (
        r"last: \w+ compares feature maps of the same shape.*"
        r"\(2, 3, 8, 6\).*\(2, 4, 8, 6\); pcka\.Distiller"
    )
    with pytest.raises(ValueError, match=message):
        MATCHING[name](*pair, None)


@pytest.mark.parametrize("name", ["pcka", "patched"])
def test_maps_of_one_shape_are_compared_in_their_own_dtype(draw, name, monkeypatch):
    seen = []
    module, loss = MATCHING[name], partial(LOSSES_OF_PATCHES[name], patch_size=2)
    module_name = f"pcka.losses.{name}"
    monkeypatch.setattr(
        f"{module_name}.{name}_loss",
        lambda own, other, **rest: (seen.append((own, other)), loss(own, other))[1],
    )
    student, teacher = draw(0, 2, 3, 8, 6).bfloat16(), draw(1, 2, 3, 8, 6).bfloat16()
    pair = Outputs(features={"last": student}), Outputs(features={"last": teacher})
    module(*pair, None)
    assert seen[0][0] is student and seen[0][1] is teacher
