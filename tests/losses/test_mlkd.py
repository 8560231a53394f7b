from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import MLKD, Outputs, kd_loss, mlkd_loss


def numpy_mlkd(student, teacher, weights, temperatures) -> complex:
    """Entry by entry of the two Gram matrices."""
    instance = batch = classes = 0.0
    samples, count = student.shape
    for temperature in temperatures:
        p_s, p_t = (
            np.array([np.exp(row / temperature) / np.exp(row / temperature).sum() for row in x])
            for x in (student, teacher)
        )
        for s, t in zip(p_s, p_t):
            instance += temperature**2 * (t * (np.log(t) - np.log(s))).sum() / samples
        for i in range(samples):
            for j in range(samples):
                batch += ((p_t[i] * p_t[j]).sum() - (p_s[i] * p_s[j]).sum()) ** 2 / samples
        for j in range(count):
            for k in range(count):
                apart = (p_t[:, j] * p_t[:, k]).sum() - (p_s[:, j] * p_s[:, k]).sum()
                classes += apart**2 / count
    return weights[0] * instance + weights[1] * batch + weights[2] * classes


@pytest.mark.parametrize("weights", [(0.45, 0.45, 0.45), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)])
@pytest.mark.parametrize("temperatures", [(2.0, 3.0, 4.0, 5.0, 6.0), (1.0,)])
def test_value_and_gradient_from_the_definition(draw, meets_numpy, weights, temperatures):
    settings = dict(zip(("instance_weight", "batch_weight", "class_weight"), weights))
    meets_numpy(
        lambda s, t: mlkd_loss(s, t, temperatures=temperatures, **settings),
        lambda s, t: numpy_mlkd(s, t, weights, temperatures),
        draw(0, 6, 5, scale=3),
        draw(1, 6, 5, scale=3),
    )


def test_the_instance_level_alone_is_kd_at_every_temperature(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    loss = mlkd_loss(
        student, teacher, instance_weight=1.0, batch_weight=0.0, class_weight=0.0,
        temperatures=[2, 7],
    )  # fmt: skip
    expected = sum(kd_loss(student, teacher, temperature=t) for t in (2.0, 7.0))
    torch.testing.assert_close(loss, expected)


def test_gram_matrices_are_not_rounded_under_autocast(draw):
    student, teacher = draw(0, 6, 5).float(), draw(1, 6, 5).float()
    expected = mlkd_loss(student, teacher, instance_weight=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mlkd_loss(student, teacher, instance_weight=0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 6, 5).requires_grad_(), draw(1, 6, 5).requires_grad_()
    mlkd_loss(student, teacher).backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None


def test_module_has_a_term_of_each_level_with_its_weight(draw):
    student, teacher = draw(0, 6, 5), draw(1, 6, 5)
    loss = MLKD(instance_weight=2.0, batch_weight=3.0, class_weight=4.0, temperatures=[3])
    terms = loss(Outputs(student), Outputs(teacher), None)
    none = {"instance_weight": 0.0, "batch_weight": 0.0, "class_weight": 0.0}
    for level, weight in (("instance", 2.0), ("batch", 3.0), ("class", 4.0)):
        settings = {**none, f"{level}_weight": weight, "temperatures": [3]}
        expected = mlkd_loss(student, teacher, **settings)
        torch.testing.assert_close(terms.pop(f"loss_mlkd_{level}"), expected)
    assert not terms


def test_refusals(draw):
    with pytest.raises(ValueError, match="logits of one shape"):
        mlkd_loss(draw(0, 6, 5), draw(1, 6, 4))
    for temperatures in ([], "4", 4.0):
        with pytest.raises(ValueError, match="temperatures must be a list of one or more"):
            MLKD(temperatures=temperatures)
    with pytest.raises(ValueError, match="temperatures must be positive and finite, got 0"):
        mlkd_loss(draw(0, 6, 5), draw(1, 6, 5), temperatures=[2.0, 0])
    with pytest.raises(ValueError, match="teacher: MLKD needs it"):
        MLKD()(Outputs(draw(0, 6, 5)), None, None)
