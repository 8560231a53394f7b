from __future__ import annotations

import numpy as np
import pytest

from pcka.losses import RCKA, Outputs, rcka_loss

LOGITS = {"temperature": 2.0, "center": False, "row_normalize": True}


@pytest.fixture
def outputs(draw):
    student = {"a": draw(0, 6, 3, 2, 2), "b": draw(1, 6, 5)}
    teacher = {"a": draw(2, 6, 4, 2, 2), "b": draw(3, 6, 7)}
    return Outputs(draw(4, 6, 8), student), Outputs(draw(5, 6, 8), teacher)


def numpy_cka(x: np.ndarray, y: np.ndarray, *, center: bool, row_normalize: bool) -> float:
    """The cosine of two Gram matrices, from its definition."""

    def gram(rows: np.ndarray) -> np.ndarray:
        rows = rows.reshape(len(rows), -1)
        k = rows @ rows.T
        if center:
            h = np.eye(len(k)) - 1 / len(k)
            k = h @ k @ h
        return k / np.sqrt(np.diag(k))[:, None] if row_normalize else k

    k, l = gram(x), gram(y)
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def numpy_terms(student: Outputs, teacher: Outputs, stage: str, **options) -> list[float]:
    """The three alignments: of the features, and of the logits' samples and classes."""
    plain = {"center": options["center"], "row_normalize": False}
    logits = {"center": options["center"], "row_normalize": options["row_normalize"]}
    features = [outputs.feature(stage).numpy() for outputs in (student, teacher)]
    powers = [
        np.exp(outputs.logits.numpy() / options["temperature"]) for outputs in (student, teacher)
    ]
    soft = [power / power.sum(1, keepdims=True) for power in powers]
    return [
        numpy_cka(*features, **plain),
        numpy_cka(*soft, **logits),
        numpy_cka(*(p.T for p in soft), **logits),
    ]


OPTIONS = [LOGITS, {**LOGITS, "center": True}, {**LOGITS, "row_normalize": False}]


@pytest.mark.parametrize("options", OPTIONS)
def test_function_is_that_of_the_paper(outputs, options):
    student, teacher = outputs
    loss = rcka_loss(
        student.feature("a"),
        teacher.feature("a"),
        student.logits,
        teacher.logits,
        feature_weight=7.0,
        intra_weight=2.0,
        inter_weight=3.0,
        **options,
    )
    feature, intra, inter = numpy_terms(student, teacher, "a", **options)
    expected = 7 * (1 - feature) + 2 * (1 - intra) + 3 * (1 - inter)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_module_gives_the_weighted_terms_of_the_paper(outputs, options):
    weights = {"intra_weight": 2.0, "inter_weight": 3.0}
    loss = RCKA(stages=("a", "b"), feature_weights=(7.0, 0.5), **weights, **options)
    assert loss.taps == ("a", "b")
    terms = {name: value.item() for name, value in loss(*outputs, None).items()}
    first, intra, inter = numpy_terms(*outputs, "a", **options)
    second, _, _ = numpy_terms(*outputs, "b", **options)
    assert list(terms) == ["loss_fcka_a", "loss_fcka_b", "loss_lcka_intra", "loss_lcka_inter"]
    expected = [7 * (1 - first), 0.5 * (1 - second), 2 * (1 - intra), 3 * (1 - inter)]
    assert list(terms.values()) == pytest.approx(expected, rel=1e-10)


def test_gradient_reaches_only_the_student(draw):
    student = [draw(0, 6, 5).requires_grad_(), draw(1, 6, 8).requires_grad_()]
    teacher = [draw(2, 6, 5).requires_grad_(), draw(3, 6, 8).requires_grad_()]
    rcka_loss(student[0], teacher[0], student[1], teacher[1]).backward()
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_a_weight_for_each_stage():
    with pytest.raises(ValueError, match="one value for each of the 1 stages"):
        RCKA(stages=("a",), feature_weights=(1.0, 2.0))
