from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import FCKA, DegenerateLevelWarning, Outputs, fcka_loss


@pytest.mark.parametrize("name", ["cka_uncentered_l2False", "cka_uncentered_different_width"])
def test_record_of_the_original_implementation(meets_record, name):
    meets_record(name, lambda s, t: fcka_loss(s, t, center=False) - 1)


def numpy_cka(x: np.ndarray, y: np.ndarray) -> float:
    """CKA from the textbook: H K H with an explicit centering matrix."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, l = (h @ z @ z.T @ h for z in (x.reshape(n, -1), y.reshape(n, -1)))
    return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))


def test_centered_maps_of_different_sizes(draw):
    student, teacher = draw(0, 7, 3, 4, 4) + 2, draw(1, 7, 5, 2, 6) - 1
    expected = 1 - numpy_cka(student.numpy(), teacher.numpy())
    assert fcka_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_positions_are_samples_of_as_many_values_as_there_are_channels(draw):
    student, teacher = draw(0, 3, 4, 2, 5) + 1, draw(1, 3, 6, 2, 5)
    rows = [np.stack([z[b, :, i, j] for b in range(3) for i in range(2) for j in range(5)])
            for z in (student.numpy(), teacher.numpy())]  # fmt: skip
    loss = fcka_loss(student, teacher, samples="positions")
    assert loss.item() == pytest.approx(1 - numpy_cka(*rows), rel=1e-12)


def test_positions_of_maps_of_different_sizes_are_those_of_the_smaller_one(draw):
    student, teacher = draw(0, 3, 4, 4, 6), draw(1, 3, 6, 2, 3)
    pooled = student.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    loss = fcka_loss(student, teacher, samples="positions")
    torch.testing.assert_close(loss, fcka_loss(pooled, teacher, samples="positions"))


def numpy_unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:
    """Song et al. 2012, equation 5, over all quadruples' closed form."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    between = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()
    return (np.trace(k @ l) + between) / (n * (n - 3))


def test_the_unbiased_estimate(draw):
    student, teacher = draw(0, 7, 3, 2, 2), draw(1, 7, 9)
    k, l = (z.flatten(1).numpy() @ z.flatten(1).numpy().T for z in (student, teacher))
    own, other = numpy_unbiased_hsic(k, k), numpy_unbiased_hsic(l, l)
    expected = 1 - numpy_unbiased_hsic(k, l) / np.sqrt(own * other)
    assert fcka_loss(student, teacher, unbiased=True).item() == pytest.approx(expected, rel=1e-10)


def test_noise_of_wide_maps_looks_aligned_to_the_plain_estimate_alone(draw):
    student, teacher = draw(0, 6, 512), draw(1, 6, 512)
    assert fcka_loss(student, teacher).item() < 0.05
    assert fcka_loss(student, teacher, unbiased=True).item() > 0.5


@pytest.mark.parametrize("center", [True, False])
def test_rotation_and_isotropic_scaling_cost_nothing(draw, center):
    x = draw(0, 8, 6) + 1
    rotation = torch.linalg.qr(draw(1, 6, 6)).Q
    assert fcka_loss(x, -3.7 * x @ rotation, center=center).item() == pytest.approx(0, abs=1e-12)


def test_a_shift_of_the_features_costs_nothing_when_centered(draw):
    x, shift = draw(0, 8, 6), 5 * draw(1, 6)
    assert fcka_loss(x + shift, x).item() == pytest.approx(0, abs=1e-12)
    assert fcka_loss(x + shift, x, center=False).item() > 0.1


def test_unrelated_features_cost(draw):
    assert fcka_loss(draw(0, 200, 4), draw(1, 200, 4)).item() > 0.9


def test_memory_format_changes_nothing(draw):
    student, teacher = draw(0, 6, 3, 4, 4), draw(1, 6, 3, 4, 4)
    strided = student.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fcka_loss(strided, teacher), fcka_loss(student, teacher))


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    fcka_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_half_features_give_a_float32_loss(draw):
    student, teacher = draw(0, 6, 9).bfloat16(), draw(1, 6, 9).bfloat16()
    loss = fcka_loss(student, teacher)
    assert loss.dtype == torch.float32
    exact = fcka_loss(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "center"), [(1, True), (2, True), (1, False)])
def test_a_batch_too_small_is_left_out_with_one_warning(draw, batch, center):
    student = draw(0, batch, 5).requires_grad_()
    with pytest.warns(DegenerateLevelWarning, match="fcka_loss: ") as caught:
        losses = [fcka_loss(student, draw(1, batch, 5), center=center) for _ in range(3)]
    assert len(caught) == 1
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert student.grad.tolist() == torch.zeros(batch, 5).tolist()


def test_two_uncentered_samples_are_not_degenerate(draw):
    assert fcka_loss(draw(0, 2, 5), draw(1, 2, 5), center=False).item() > 1e-3


def test_module_gives_a_weighted_term_a_stage(draw):
    student = {"a": draw(0, 6, 3, 2, 2), "b": draw(1, 6, 5)}
    teacher = {"a": draw(2, 6, 4, 2, 2), "b": draw(3, 6, 7)}
    loss = FCKA(stages=("a", "b"), weights=(10.0, 0.5), center=False)
    assert loss.taps == ("a", "b")
    terms = loss(Outputs(features=student), Outputs(features=teacher), None)
    assert list(terms) == ["loss_fcka_a", "loss_fcka_b"]
    for name, weight in (("a", 10.0), ("b", 0.5)):
        expected = weight * fcka_loss(student[name], teacher[name], center=False)
        torch.testing.assert_close(terms[f"loss_fcka_{name}"], expected)


@pytest.mark.parametrize("settings", [{"unbiased": True}, {"samples": "positions"}])
def test_module_compares_as_it_is_set(draw, settings):
    outputs = Outputs(features={"last": draw(0, 6, 3, 2, 2)})
    teacher = Outputs(features={"last": draw(1, 6, 4, 2, 2)})
    (term,) = FCKA(weights=2.0, **settings)(outputs, teacher, None).values()
    expected = fcka_loss(outputs.features["last"], teacher.features["last"], **settings)
    torch.testing.assert_close(term, 2 * expected)
    assert not torch.allclose(term, *FCKA(weights=2.0)(outputs, teacher, None).values())


def test_every_degenerate_stage_of_a_module_warns_once(draw):
    loss = FCKA(stages=("a", "b"), weights=(1.0, 1.0))
    outputs = Outputs(features={"a": draw(0, 2, 5), "b": draw(1, 2, 5)})
    with pytest.warns(DegenerateLevelWarning) as caught:
        loss(outputs, outputs, None)
        loss(outputs, outputs, None)
    named = [str(warning.message).split(":")[0] for warning in caught]
    assert named == ["loss_fcka_a", "loss_fcka_b"]


def test_refusals(draw):
    x = draw(0, 6, 5)
    with pytest.raises(ValueError, match="same samples"):
        fcka_loss(x, draw(1, 5, 5))
    with pytest.raises(ValueError, match="weights must hold one value for each of the 2 stages"):
        FCKA(stages=("a", "b"), weights=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"feature 'last'.*\['a'\]"):
        FCKA()(Outputs(features={"a": x}), Outputs(features={"a": x}), None)
    with pytest.raises(ValueError, match="samples must be one of images, positions"):
        FCKA(samples="pixels")
    with pytest.raises(ValueError, match="it needs center=True"):
        FCKA(unbiased=True, center=False)
    with pytest.raises(ValueError, match="unbiased=True needs samples='images'"):
        fcka_loss(x, x, unbiased=True, samples="positions")
    with pytest.raises(ValueError, match="must be feature maps"):
        fcka_loss(x, x, samples="positions")
    with pytest.raises(ValueError, match="teacher: FCKA needs it"):
        FCKA()(Outputs(features={"last": x}), None, None)
