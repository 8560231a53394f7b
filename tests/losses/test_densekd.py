"""Dense KD and LD against their equations in NumPy, position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import Outputs, dense_boxes_loss, dense_scores_loss, ld_loss
from pcka.losses.heads import Dense, DenseHead

B, R, K = 2, 5, 3


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _size(x):
    """``abs`` that a complex step goes through."""
    return np.where(x.real < 0, -x, x)


def _objects(scores):
    """The weight of each position, and how many objects the teacher sees."""
    best = np.array([[max(_sigmoid(row)) for row in image] for image in scores])
    return best, max(1.0, best.sum())


def _scores(student, teacher, beta):
    total = 0
    for place in np.ndindex(teacher.shape):
        p, q = _sigmoid(student[place]), _sigmoid(teacher[place])
        cross_entropy = -(1 - q) * np.log(1 - p) - q * np.log(p)
        total += (_size(p - q) ** beta if beta else 1) * cross_entropy
    return total / _objects(teacher)[1]


def _larger(a, b):
    return a if a.real > b.real else b


def _smaller(a, b):
    return a if a.real < b.real else b


def _giou(one, other):
    def area(x0, y0, x1, y1):
        return _larger(x1 - x0, 0 * x0) * _larger(y1 - y0, 0 * y0)

    starts = [(_larger(a, b), _smaller(a, b)) for a, b in zip(one[:2], other[:2])]
    ends = [(_smaller(a, b), _larger(a, b)) for a, b in zip(one[2:], other[2:])]
    inner = area(*(s[0] for s in starts), *(e[0] for e in ends))
    outer = area(*(s[1] for s in starts), *(e[1] for e in ends))
    union = area(*one) + area(*other) - inner
    return inner / union - (outer - union) / outer


def _boxes(student, teacher, scores):
    weights, objects = _objects(scores)
    total = sum(
        weights[place] * (1 - _giou(student[place], teacher[place]))
        for place in np.ndindex(*weights.shape)
    )
    return total / objects


def _softmax(x):
    return np.exp(x) / np.exp(x).sum()


def _ld(student, teacher, scores, temperature):
    weights, objects = _objects(scores)
    total = 0
    for place in np.ndindex(*weights.shape):
        for edge in range(4):
            p, q = (_softmax(x[place][edge] / temperature) for x in (student, teacher))
            total += weights[place] * (q * np.log(q / p)).sum()
    return temperature**2 * total / (4 * objects)


def _corners(draw, seed):
    """Boxes that overlap partly, as ``(B, R, 4)``."""
    centers, sizes = draw(seed, B, R, 2), draw(seed + 1, B, R, 2).abs() + 0.5
    return torch.cat([centers - sizes, centers + sizes], -1)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shift", [0.0, -6.0])  # many objects, and less than one
def test_scores_have_value_and_gradient_of_the_equation(draw, meets_numpy, beta, shift):
    student, teacher = draw(0, B, R, K), draw(1, B, R, K) + shift
    meets_numpy(
        lambda s, t: dense_scores_loss(s, t, beta=beta),
        lambda s, t: _scores(s, t, beta),
        student,
        teacher,
    )


def test_boxes_have_value_and_gradient_of_the_equation(draw, meets_numpy):
    scores = draw(2, B, R, K)
    meets_numpy(
        lambda s, t: dense_boxes_loss(s, t, scores),
        lambda s, t: _boxes(s, t, scores.numpy()),
        _corners(draw, 3),
        _corners(draw, 5),
    )


def test_ld_has_value_and_gradient_of_the_equation(draw, meets_numpy):
    scores = draw(2, B, R, K)
    meets_numpy(
        lambda s, t: ld_loss(s, t, scores, temperature=3.0),
        lambda s, t: _ld(s, t, scores.numpy(), 3.0),
        draw(0, B, R, 4, 6, scale=3),
        draw(1, B, R, 4, 6, scale=3),
    )


def test_a_weight_of_the_code_of_ld_is_that_weight_times_objects_over_distances(draw):
    """It takes the mean over the distances, and does not divide by the objects."""
    student, teacher, scores = draw(0, B, R, 4, 17), draw(1, B, R, 4, 17), draw(2, B, R, K)
    weights, objects = _objects(scores.numpy())
    theirs = 0
    for place in np.ndindex(*weights.shape):
        p, q = ([_softmax(edge / 10) for edge in x[place].numpy()] for x in (student, teacher))
        edges = [100 * (b * np.log(b / a)).mean() for a, b in zip(p, q)]
        theirs += 0.25 * weights[place] * sum(edges) / 4
    ours = 0.25 * objects / 17 * ld_loss(student, teacher, scores)
    assert ours.item() == pytest.approx(theirs, rel=1e-9)


def test_scores_weigh_by_the_authors_power():
    assert losses.defaults("DENSEKD")["beta"] == 1.0
    scores = torch.tensor([[[0.0]]]), torch.tensor([[[2.0]]])
    assert dense_scores_loss(*scores) == dense_scores_loss(*scores, beta=1.0)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_equal_predictions_cost_nothing_and_stay(draw, beta):
    scores, boxes = draw(0, B, R, K).requires_grad_(), _corners(draw, 1).requires_grad_()
    total = dense_scores_loss(scores, scores.detach(), beta=beta)
    total = total + dense_boxes_loss(boxes, boxes.detach(), scores)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert scores.grad.abs().max() == 0


def test_boxes_without_an_area_are_no_trouble():
    student = torch.zeros(1, 2, 4, requires_grad=True)
    loss = dense_boxes_loss(student, torch.zeros(1, 2, 4), torch.zeros(1, 2, 1))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def _outputs(draw, seed, positions=R, bins=None):
    corners = _corners(draw, seed)[:, :positions]
    spread = None if bins is None else draw(seed + 2, B, positions, 4, bins)
    return Outputs(head=DenseHead(Dense(draw(seed + 3, B, positions, K), corners, spread)))


def test_the_module_weighs_both_terms(draw):
    student, teacher = _outputs(draw, 0), _outputs(draw, 10)
    own, other = student.head.predictions, teacher.head.predictions
    terms = losses.build("DENSEKD", cls_weight=2.0, box_weight=0.5, beta=1.0)(
        student, teacher, None
    )
    assert terms == {
        "loss_densekd_cls": 2 * dense_scores_loss(own.logits, other.logits, beta=1.0),
        "loss_densekd_box": 0.5 * dense_boxes_loss(own.boxes, other.boxes, other.logits),
    }
    scores_alone = losses.build("DENSEKD", box_weight=0.0)
    assert scores_alone(student, teacher, None).keys() == {"loss_densekd_cls"}


def test_the_module_of_distributions_has_one_term(draw):
    student, teacher = _outputs(draw, 0, bins=6), _outputs(draw, 10, bins=6)
    own, other = student.head.predictions, teacher.head.predictions
    terms = losses.build("LD", weight=2.0, temperature=5.0)(student, teacher, None)
    expected = ld_loss(own.distributions, other.distributions, other.logits, temperature=5.0)
    assert terms == {"loss_ld": 2 * expected}


@pytest.mark.parametrize("name", ["DENSEKD", "CROSSKD", "LD"])
def test_a_model_without_a_dense_head_is_refused(draw, name):
    with pytest.raises(ValueError, match=r"teacher\.head: \w+ needs a dense head's output, got"):
        losses.build(name)(_outputs(draw, 0), Outputs(), None)


@pytest.mark.parametrize("side", [0, 1])
def test_ld_of_heads_that_predict_one_number_an_edge_is_refused(draw, side):
    pair = [_outputs(draw, 0, bins=6), _outputs(draw, 10, bins=6)]
    pair[side] = _outputs(draw, 0)
    role = ("student", "teacher")[side]
    with pytest.raises(ValueError, match=f"the {role}'s head predicts one number for each edge"):
        losses.build("LD").prepare(*pair)


def test_other_anchors_are_refused_before_the_training(draw):
    with pytest.raises(ValueError, match="need the same levels, anchors and classes"):
        losses.build("DENSEKD").prepare(_outputs(draw, 0), _outputs(draw, 10, positions=4))


def test_a_power_whose_gradient_is_infinite_is_refused():
    for name in ("DENSEKD", "CROSSKD"):
        with pytest.raises(ValueError, match=r"beta must be 0, or 1 or more, got 0\.5"):
            losses.build(name, beta=0.5)


@pytest.mark.parametrize(("boxes", "scores"), [((B, R, 3), (B, R, K)), ((B, R, 4), (B, R + 1, K))])
def test_what_is_no_box_is_refused(draw, boxes, scores):
    with pytest.raises(ValueError, match=r"boxes must be \(B, R, 4\) and scores \(B, R, K\)"):
        dense_boxes_loss(draw(0, *boxes), draw(1, *boxes), draw(2, *scores))
