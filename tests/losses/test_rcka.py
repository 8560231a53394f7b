from __future__ import annotations

import pytest
import torch

from pcka.losses import FCKA, LCKA, RCKA, Outputs, fcka_loss, lcka_loss, rcka_loss

LOGITS = {"temperature": 2.0, "center": False, "row_normalize": True}


@pytest.fixture
def outputs(draw):
    student = {"a": draw(0, 6, 3, 2, 2), "b": draw(1, 6, 5)}
    teacher = {"a": draw(2, 6, 4, 2, 2), "b": draw(3, 6, 7)}
    return Outputs(draw(4, 6, 8), student), Outputs(draw(5, 6, 8), teacher)


def test_function_is_the_weighted_sum_of_its_parts(outputs):
    student, teacher = outputs
    features = student.feature("a"), teacher.feature("a")
    weights = {"intra_weight": 2.0, "inter_weight": 3.0}
    loss = rcka_loss(
        *features, student.logits, teacher.logits, feature_weight=7.0, **weights, **LOGITS
    )
    logits = lcka_loss(student.logits, teacher.logits, **weights, **LOGITS)
    torch.testing.assert_close(loss, 7 * fcka_loss(*features, center=False) + logits)


def test_module_gives_the_terms_of_its_parts(outputs):
    weights = {"intra_weight": 2.0, "inter_weight": 3.0}
    loss = RCKA(stages=("a", "b"), feature_weights=(7.0, 0.5), **weights, **LOGITS)
    assert loss.taps == ("a", "b")
    terms = loss(*outputs, None)
    expected = {
        **FCKA(stages=("a", "b"), weights=(7.0, 0.5), center=False)(*outputs, None),
        **LCKA(**weights, **LOGITS)(*outputs, None),
    }
    assert list(terms) == ["loss_fcka_a", "loss_fcka_b", "loss_lcka_intra", "loss_lcka_inter"]
    assert terms == expected


def test_gradient_reaches_only_the_student(draw):
    student = [draw(0, 6, 5).requires_grad_(), draw(1, 6, 8).requires_grad_()]
    teacher = [draw(2, 6, 5).requires_grad_(), draw(3, 6, 8).requires_grad_()]
    rcka_loss(student[0], teacher[0], student[1], teacher[1]).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_a_weight_for_each_stage():
    with pytest.raises(ValueError, match="one value for each of the 1 stages"):
        RCKA(stages=("a",), feature_weights=(1.0, 2.0))
