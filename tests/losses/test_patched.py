from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import Outputs, Patched, patched_loss

METHODS = ("at", "kl", "pkd", "dist")


def test_record_of_the_original_implementation(meets_record):
    meets_record("at_patch", patched_loss)


def _patches(maps, size):
    """``(C, N, B * P * P)``, one patch after the other."""
    _, _, height, width = maps.shape
    corners = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
    cut = [maps[:, :, y : y + size, x : x + size] for y, x in corners]
    return np.stack([patch.transpose(1, 0, 2, 3).reshape(len(patch[0]), -1) for patch in cut], 1)


def _softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8)


def _at(s, t):
    a_s, a_t = (x.sum(0) / np.linalg.norm(x.sum(0), axis=1, keepdims=True) for x in (s, t))
    return ((a_s - a_t) ** 2).mean() / len(s)


def _kl(s, t):
    p_s, p_t = _softmax(s / 4), _softmax(t / 4)
    return 16 * (p_t * np.log(p_t / p_s)).sum(-1).mean()


def _pkd(s, t):
    def normal(x):
        return (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6)

    return ((normal(s) - normal(t)) ** 2).mean() / 2


def _dist(s, t):
    losses = []
    for p_s, p_t in zip(_softmax(s / 4), _softmax(t / 4)):
        rows = np.mean([_pearson(a, b) for a, b in zip(p_s, p_t)])
        columns = np.mean([_pearson(a, b) for a, b in zip(p_s.T, p_t.T)])
        losses.append(16 * ((1 - rows) + (1 - columns)))
    return np.mean(losses)


ORACLES = {"at": _at, "kl": _kl, "pkd": _pkd, "dist": _dist}


@pytest.mark.parametrize("method", METHODS)
def test_formula_on_patches_cut_one_by_one(draw, method):
    student, teacher = (draw(seed, 2, 3, 8, 12, scale=3) for seed in (0, 1))
    expected = ORACLES[method](*(_patches(maps.numpy(), 4) for maps in (student, teacher)))
    loss = patched_loss(student, teacher, method=method, patch_size=4)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_finite_differences_and_none_for_the_teacher(draw, method):
    student, teacher = (draw(seed, 2, 2, 5, 6).requires_grad_() for seed in (0, 1))
    options = {"method": method, "patch_size": (2, 3)}
    assert torch.autograd.gradcheck(lambda s: patched_loss(s, teacher, **options), student)
    patched_loss(student, teacher, **options).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_a_student_like_its_teacher_costs_nothing(draw, method):
    maps = draw(0, 2, 3, 8, 12)
    loss = patched_loss(maps, maps, method=method, patch_size=4)
    # DIST's 1e-8 in the denominator is felt where a softmax over D entries is nearly flat.
    assert loss.item() == pytest.approx(0, abs=2e-3 if method == "dist" else 1e-12)


def test_pkd_does_not_see_scale_and_shift_of_a_patch(draw):
    teacher = draw(0, 1, 2, 4, 8)
    student = teacher.clone()
    student[:, 1, :, 4:] = 3 * student[:, 1, :, 4:] + 2
    options = {"method": "pkd", "patch_size": 4}
    assert patched_loss(student, teacher, **options).item() == pytest.approx(0, abs=1e-9)
    assert patched_loss(student.flip(3), teacher, **options).item() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_widened_first(draw, method, dtype):
    # Large enough for the sum over channels to leave float16, and off the patch's multiples.
    student, teacher = (draw(seed, 2, 8, 5, 7, scale=9000).to(dtype) for seed in (0, 1))
    options = {"method": method, "patch_size": 4, "temperature": 9000.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = patched_loss(student, teacher, **options)
    assert loss.dtype == torch.float32
    exact = patched_loss(student.double(), teacher.double(), **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_constant_maps_give_no_nan(method):
    student = torch.zeros(2, 3, 8, 8).requires_grad_()
    loss = patched_loss(student, torch.ones(2, 3, 8, 8), method=method, patch_size=4)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_module_gives_a_weighted_term_a_stage(draw):
    student, teacher = (
        {"a": draw(seed, 2, 3, 8, 12), "b": draw(seed + 1, 2, 3, 8, 8)} for seed in (0, 2)
    )
    settings = {"a": (10.0, 4), "b": (0.5, (2, 4))}
    weights, patch_sizes = zip(*settings.values())
    loss = Patched(
        method="kl", stages=["a", "b"], weights=weights, patch_sizes=patch_sizes, temperature=2.0
    )
    terms = loss(Outputs(features=student), Outputs(features=teacher), None)
    assert list(terms) == ["loss_patched_kl_a", "loss_patched_kl_b"]
    for stage, (weight, patch) in settings.items():
        expected = patched_loss(
            student[stage], teacher[stage], method="kl", patch_size=patch, temperature=2.0
        )
        torch.testing.assert_close(terms[f"loss_patched_kl_{stage}"], weight * expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "cka"}, "method must be one of at, kl, pkd, dist; got 'cka'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"stages": ("a", "b"), "patch_sizes": (4, 4, 4)}, "patch_sizes must hold one value"),
    ],
)
def test_settings_are_refused_when_the_loss_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        Patched(**settings)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 4, 5), {}, r"one shape \(B, C, H, W\)"),
        ((1, 3, 4, 4), {"patch_size": 0}, "patch_size must be a positive int.*got 0"),
        ((1, 3, 4, 4), {"method": "pkd", "patch_size": 1}, "two entries.*use a larger patch"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(draw, shape, options, message):
    with pytest.raises(ValueError, match=message):
        patched_loss(draw(0, 1, 3, 4, 4), draw(1, *shape), **options)


def test_needs_a_teacher(draw):
    with pytest.raises(ValueError, match="teacher: Patched needs it"):
        Patched()(Outputs(features={"last": draw(0, 2, 3, 8, 12)}), None, None)
