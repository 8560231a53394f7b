"""GFL: which points are whose, its losses against NumPy, and that it learns an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from detection.atss import atss_match
from detection.config import PROJECT, load_config
from detection.gfl import distribution_focal_loss, lazy_gfl
from pcka.engine.config import ConfigError

STUDENT = str(PROJECT / "configs/detection/coco/gfl_r50/student.yaml")
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0",
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.GFL.NUM_CLASSES", "3",
]  # fmt: skip


def _model(*overrides):
    torch.manual_seed(0)
    return build_model(load_config(STUDENT, [*SMALL, *overrides]))


def _row(points, stride=8.0):
    """The squares about points along the x axis."""
    x = stride * torch.arange(points)
    return Boxes(torch.stack([x, 0 * x, x, 0 * x], 1) + stride / 2 * torch.tensor([-1, -1, 1, 1]))


def test_a_point_is_that_objects_which_its_square_overlaps_most():
    objects = Boxes(torch.tensor([[0.0, -8, 15, 8], [0, -8, 16, 8], [16, -8, 32, 8]]))
    # By hand: point 1 overlaps the first by 15/16 and the second by 1, above 0.883 and 0.941.
    found = atss_match([_row(4)], objects, scale=2.0, topk=3)
    assert found.tolist() == [-1, 1, -1, 2]


def test_a_point_overlaps_its_object_by_a_deviation_more_than_the_mean():
    # By hand: 0.6 twice and 0.143, whose mean is 0.448 and whose deviation is 0.264.
    objects = Boxes(torch.tensor([[4.0, -8, 20, 8]]))
    assert atss_match([_row(4)], objects, scale=2.0, topk=3).tolist() == [-1] * 4


@pytest.mark.parametrize(("first", "last", "owner"), [(7.0, 17.0, 0), (9.0, 15.0, -1)])
def test_a_point_lies_in_its_object(first, last, owner):
    objects = Boxes(torch.tensor([[first, -1, last, 1]]))
    found = atss_match([_row(4)], objects, scale=2.0, topk=2)
    assert found.tolist() == [-1, owner, owner, -1]


def test_an_image_without_objects_is_background():
    assert atss_match([_row(4)], Boxes(torch.zeros(0, 4))).tolist() == [-1] * 4


def test_the_only_candidate_is_the_objects():
    assert atss_match([_row(1)], Boxes(torch.tensor([[-4.0, -4, 4, 4]]))).tolist() == [0]


def _iou(one, other):
    inner = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = max(inner[0], 0) * max(inner[1], 0)
    return shared / (sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - shared)


def _numpy_match(levels, objects, scale, topk):
    """Point by point and object by object."""
    points = np.concatenate(levels)
    best, owner = np.zeros(len(points)), np.full(len(points), -1)
    for number, box in enumerate(objects):
        candidates, first = [], 0
        for level in levels:
            centers = (level[:, :2] + level[:, 2:]) / 2
            apart = np.hypot(*((box[:2] + box[2:]) / 2 - centers).T)
            candidates += list(first + np.argsort(apart, kind="stable")[:topk])
            first += len(level)
        overlaps = {}
        for place in candidates:
            center = (points[place][:2] + points[place][2:]) / 2
            half = scale * (points[place][2] - points[place][0]) / 2
            overlaps[place] = _iou(np.concatenate([center - half, center + half]), box)
        values = np.array(list(overlaps.values()))
        for place, overlap in overlaps.items():
            center = (points[place][:2] + points[place][2:]) / 2
            inside = (center > box[:2]).all() and (center < box[2:]).all()
            if overlap >= values.mean() + values.std(ddof=1) and inside and overlap > best[place]:
                best[place], owner[place] = overlap, number
    return owner


def test_points_are_assigned_as_the_algorithm_says():
    model = _model()
    features = [torch.zeros(1, 1, 128 // stride, 128 // stride) for stride in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    assert anchors[0].get_centers()[:2].tolist() == [[0, 0], [8, 0]]
    generator = np.random.RandomState(0)
    corners = generator.rand(12, 2) * 90
    objects = np.concatenate([corners, corners + 5 + generator.rand(12, 2) * 40], 1)
    boxes = Boxes(torch.tensor(objects, dtype=torch.float32))
    found = atss_match(anchors, boxes)
    levels = [level.tensor.double().numpy() for level in anchors]
    expected = _numpy_match(levels, boxes.tensor.double().numpy(), 8.0, 9)
    assert len(set(expected.tolist())) > 6
    assert found.tolist() == expected.tolist()


def test_distances_between_integers_are_shared_by_their_neighbours():
    generator = np.random.RandomState(0)
    edges, wanted = generator.randn(7, 5), np.array([0.0, 0.25, 1, 2.6, 3.9, 4.7, -1])
    expected = []
    for logits, distance in zip(edges, np.clip(wanted, 0, 3.9)):
        log, left = logits - np.log(np.exp(logits).sum()), int(distance)
        expected.append((distance - left - 1) * log[left] + (left - distance) * log[left + 1])
    found = distribution_focal_loss(torch.tensor(edges), torch.tensor(wanted))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softmax(x):
    return np.exp(x) / np.exp(x).sum()


def _numpy_terms(points, logits, edges, matches, objects, classes):
    """The three terms, point by point; 2.0 and 0.25 are the published factors."""
    quality, weights, loc, dfl = np.zeros_like(logits), [], [], []
    for place in np.argwhere(matches >= 0):
        image, point = place
        box = points[point]
        side, center = box[2] - box[0], (box[:2] + box[2:]) / 2
        wanted = objects[image][matches[image, point]]
        spread = edges[image, point].reshape(4, -1)
        means = [(_softmax(edge) * np.arange(len(edge))).sum() * side for edge in spread]
        decoded = np.array([*(center - means[:2]), *(center + means[2:])])
        overlap = _iou(decoded, wanted)
        quality[image, point, classes[image][matches[image, point]]] = overlap
        weights.append(_sigmoid(logits[image, point].max()))
        hull = np.array([*np.minimum(decoded, wanted)[:2], *np.maximum(decoded, wanted)[2:]])
        area = (hull[2] - hull[0]) * (hull[3] - hull[1])
        both = [(b[2] - b[0]) * (b[3] - b[1]) for b in (decoded, wanted)]
        union = sum(both) / (1 + overlap)  # as I = IoU U and U = A + B - I
        loc.append(1 - overlap + (area - union) / area)
        distances = np.array([*(center - wanted[:2]), *(wanted[2:] - center)]) / side
        for logs, distance in zip(np.log([_softmax(e) for e in spread]), distances):
            distance = min(max(distance, 0), len(logs) - 1.1)
            left = int(distance)
            step = distance - left
            dfl.append(-(1 - step) * logs[left] - step * logs[left + 1])
    scores = _sigmoid(logits)
    entropy = -quality * np.log(scores) - (1 - quality) * np.log(1 - scores)
    total = max(1, sum(weights))
    dfl = np.array(dfl).reshape(-1, 4).mean(1)
    return {
        "loss_gfl_cls": (np.abs(scores - quality) ** 2 * entropy).sum() / max(1, len(weights)),
        "loss_gfl_loc": 2.0 * np.dot(weights, loc) / total,
        "loss_gfl_dfl": 0.25 * np.dot(weights, dfl) / total,
    }


@pytest.mark.parametrize("shift", [0.0, -6.0])  # weights that sum to more, and to less than one
def test_losses_have_the_values_of_their_equations(storage, shift):
    model = _model().double()
    model.places = model.places.double()
    generator = np.random.RandomState(1)
    points = np.array([[0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8], [0, 0, 16, 16.0]])
    objects = [np.array([[2.0, 1, 20, 12], [9, 2, 30, 7]]), np.array([[-20.0, -3, 12, 290]])]
    classes = [np.array([2, 0]), np.array([1])]
    matches = np.array([[0, 1, -1, -1], [-1, -1, -1, 0]])
    logits = generator.randn(2, 4, 3) + shift
    edges = 3 * generator.randn(2, 4, 4 * 17)
    instances = []
    for boxes, kinds in zip(objects, classes):
        image = Instances((32, 32))
        image.gt_boxes, image.gt_classes = Boxes(torch.zeros(len(boxes), 4)), torch.tensor(kinds)
        image.gt_boxes.tensor = torch.tensor(boxes)
        instances.append(image)
    given = (torch.tensor(x) for x in (points, logits, edges))
    found = model._terms(*given, list(torch.tensor(matches)), instances)
    expected = _numpy_terms(points, logits, edges, matches, objects, classes)
    assert found.keys() == expected.keys()
    for name, term in found.items():
        assert term.item() == pytest.approx(expected[name], rel=1e-6), name


def test_the_lazy_config_describes_the_same_model():
    cfg = load_config(STUDENT, [*SMALL, "MODEL.GFL.REG_MAX", "7"])
    one, other = build_model(cfg).eval(), instantiate(lazy_gfl(cfg)).eval()
    other.load_state_dict(one.state_dict())
    assert one.head.bbox_pred.out_channels == 4 * 8
    assert not one.backbone.top_block.relu
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        features = [
            [m.backbone(image)[level] for level in m.head_in_features] for m in (one, other)
        ]
        for own, others in zip(*(m.head(x) for m, x in zip((one, other), features))):
            assert all(torch.equal(*pair) for pair in zip(own, others))
    with pytest.raises(NotImplementedError, match="an exported GFL is for inference"):
        other.forward_training()


@pytest.mark.parametrize("key", ["REG_MAX", "ATSS_TOPK", "NUM_CONVS"])
def test_a_number_that_no_gfl_has_is_refused(key):
    with pytest.raises(ConfigError, match=f"MODEL.GFL.{key}: expected 1 or more, got 0"):
        _model(f"MODEL.GFL.{key}", "0")


def test_a_backbone_of_other_widths_is_refused():
    with pytest.raises(ConfigError, match=r"STEM_OUT_CHANNELS: GFL takes ResNets of the usual wid"):
        _model("MODEL.RESNETS.STEM_OUT_CHANNELS", "32")
