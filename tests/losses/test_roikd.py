"""RoI KD against its equations in NumPy, proposal by proposal."""

from __future__ import annotations

import numpy as np
import pytest

from pcka import losses
from pcka.losses import Outputs, kd_loss, roi_boxes_loss
from pcka.losses.heads import RegionHead

R, K = 5, 3


def _boxes(student, teacher, scores):
    total = sure = 0
    for r, row in enumerate(scores):
        p = np.exp(row) / np.exp(row).sum()
        for k in range(K):
            column = k if student.shape[1] == K else 0
            difference = student[r, column] - teacher[r, column]
            total += p[k] * np.where(difference.real < 0, -difference, difference).sum()
            sure += p[k]
    return total / max(1, sure)


@pytest.mark.parametrize("boxes", [K, 1])  # one a class, and one for all classes
@pytest.mark.parametrize("background", [0.0, 9.0])  # many objects, and less than one
def test_boxes_have_value_and_gradient_of_the_equation(draw, meets_numpy, boxes, background):
    scores = draw(2, R, K + 1)
    scores[:, -1] += background
    meets_numpy(
        lambda s, t: roi_boxes_loss(s, t, scores),
        lambda s, t: _boxes(s, t, scores.numpy()),
        draw(0, R, boxes, 4),
        draw(1, R, boxes, 4),
    )


def _outputs(draw, seed, classes=K):
    return Outputs(head=RegionHead(draw(seed, R, classes + 1), draw(seed + 1, R, classes, 4)))


def test_the_module_weighs_both_terms(draw):
    student, teacher = _outputs(draw, 0), _outputs(draw, 10)
    own, other = student.head, teacher.head
    loss = losses.build("ROIKD", cls_weight=2.0, box_weight=0.5, temperature=3.0)
    assert loss(student, teacher, None) == {
        "loss_roikd_cls": 2 * kd_loss(own.logits, other.logits, temperature=3.0),
        "loss_roikd_box": 0.5 * roi_boxes_loss(own.deltas, other.deltas, other.logits),
    }
    classes_alone = losses.build("ROIKD", box_weight=0.0)
    assert classes_alone(student, teacher, None).keys() == {"loss_roikd_cls"}


def test_a_model_without_a_head_of_regions_is_refused(draw):
    with pytest.raises(ValueError, match=r"teacher\.head: RoIKD needs a region head's output"):
        losses.build("ROIKD")(_outputs(draw, 0), Outputs(), None)


def test_other_classes_are_refused_before_the_training(draw):
    with pytest.raises(ValueError, match="the same classes in the same order"):
        losses.build("ROIKD").prepare(_outputs(draw, 0), _outputs(draw, 10, classes=4))


def test_shifts_that_do_not_go_together_are_refused(draw):
    with pytest.raises(ValueError, match="one box a class or one for all"):
        roi_boxes_loss(draw(0, R, K, 4), draw(1, R, 1, 4), draw(2, R, K + 1))
    with pytest.raises(ValueError, match=r"scores must be \(R, K \+ 1\) of the shifts"):
        roi_boxes_loss(draw(0, R, K, 4), draw(1, R, K, 4), draw(2, R, K))


@pytest.mark.parametrize("proposals", [0, 2.5])
def test_proposals_are_counted(proposals):
    with pytest.raises(ValueError, match="proposals must be a positive number of boxes, got"):
        losses.build("ROIKD", proposals=proposals)
