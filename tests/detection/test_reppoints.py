"""RepPoints: which places are whose, the box about points, and the losses, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from detection.config import PROJECT, load_config
from detection.reppoints import lazy_reppoints, nearest_places, overlapping_places
from pcka.engine.config import ConfigError

STUDENT = str(PROJECT / "configs/detection/coco/reppoints_r50/student.yaml")
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.REPPOINTS.NUM_CLASSES", "3",
]  # fmt: skip


def _model(*overrides):
    torch.manual_seed(0)
    return build_model(load_config(STUDENT, [*SMALL, *overrides]))


def _anchors(model):
    strides = (8, 16, 32, 64, 128)
    return model.anchor_generator(
        [torch.zeros(1, 1, 128 // stride, 128 // stride) for stride in strides]
    )


def test_an_object_has_the_nearest_place_of_its_level():
    anchors = _anchors(_model())
    objects = [
        [28.0, 29, 60, 62],  # 32 x 33, from 4 * 8 on: level 8; its centre is nearest to (40, 48)
        [27, 28, 61, 64],  # as large, but 0.06 of its side nearer to that place
        [0, 0, 128, 128],  # 4 * 32, so level 32
        [0, 0, 4, 4],  # smaller than any: level 8
    ]
    found = nearest_places(anchors, Boxes(torch.tensor(objects)))
    owners = {place: owner for place, owner in enumerate(found.tolist()) if owner >= 0}
    # Level 8 has 16 places a row, levels 8 and 16 have 256 and 64 places, level 32 has 4 a row.
    assert owners == {16 * 6 + 5: 1, 256 + 64 + 4 * 2 + 2: 2, 0: 3}
    assert nearest_places(anchors, Boxes(torch.zeros(0, 4))).max() == -1


def test_a_place_is_that_objects_which_its_box_overlaps():
    objects = Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [90, 90, 99, 99]]))
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 6],  # 0.6 of the first
            [0, 0, 10, 4.5],  # 0.45: neither
            [0, 0, 10, 3],  # 0.3: background
            [20, 0, 30, 2],  # 0.2, and the best of the second
            [50, 50, 60, 60],  # of none, as is the third object of any
        ]
    )
    assert overlapping_places(boxes, objects).tolist() == [0, -2, -1, 1, -1]
    assert overlapping_places(boxes, Boxes(torch.zeros(0, 4))).tolist() == [-1] * 5


@pytest.mark.parametrize("transform", ["moment", "minmax"])
def test_points_have_a_box(transform):
    model = _model("MODEL.REPPOINTS.TRANSFORM", transform)
    points = np.random.RandomState(0).randn(4, 18)
    y, x = points[:, ::2], points[:, 1::2]
    if transform == "minmax":
        expected = [x.min(1), y.min(1), x.max(1), y.max(1)]
        assert "moment" not in model.state_dict()
    else:
        model.moment.data.copy_(torch.tensor([0.3, -0.2]))
        width, height = x.std(1, ddof=1) * np.exp(0.3), y.std(1, ddof=1) * np.exp(-0.2)
        middle = x.mean(1), y.mean(1)
        expected = [
            middle[0] - width, middle[1] - height, middle[0] + width, middle[1] + height
        ]  # fmt: skip
    found = model.corners(torch.tensor(points)).detach().numpy()
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-6)


def test_the_factors_of_the_box_learn_slowly():
    model = _model()
    points = torch.randn(1, 18)
    corners = model.corners(points)
    (corners[0, 2] - corners[0, 0]).backward()
    width = 2 * points[0, 1::2].std() * 0.01  # of a gradient through exp(0)
    torch.testing.assert_close(model.moment.grad, torch.stack([width, 0 * width]))


def test_points_that_are_all_one_send_a_finite_gradient():
    model, points = _model(), torch.zeros(2, 18, requires_grad=True)
    model.corners(points).sum().backward()
    assert points.grad.isfinite().all()


def test_the_second_look_is_at_the_first_points():
    """With points on the grid of a convolution, it is that convolution."""
    head = _model().head
    look = head.point_look
    features = [torch.randn(2, 64, 6, 5)]
    for layer in head.initial[::2]:
        torch.nn.init.zeros_(layer.weight)
    head.initial[2].bias.data.copy_(head.base.flatten())
    with torch.no_grad():
        logits, points, first = (maps[0] for maps in head(features))
        inner = F.relu(F.conv2d(head.bbox_subnet(features[0]), look.weight, padding=1))
        scores = F.relu(F.conv2d(head.cls_subnet(features[0]), head.cls_look.weight, padding=1))
        torch.testing.assert_close(points - first, head.bbox_pred(inner), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, head.cls_score(scores), rtol=1e-4, atol=1e-5)


def test_a_tenth_of_the_gradient_goes_back_through_the_first_points():
    head = _model().head
    feature = [torch.randn(1, 64, 4, 4)]
    bias = head.initial[2].bias

    def gradient(factor):
        head.gradient_factor = factor
        (grad,) = torch.autograd.grad(head(feature)[0][0].square().sum(), bias)
        return grad

    torch.testing.assert_close(gradient(0.1), 0.1 * gradient(1.0))
    assert gradient(1.0).norm() > 0
    head.gradient_factor = 0.0  # the last points are steps from the first ones, which stay
    (grad,) = torch.autograd.grad(head(feature)[1][0].sum(), bias)
    assert not grad.any()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _smooth(x):
    x = np.abs(x)
    return np.where(x < 0.11, 0.5 * x**2 / 0.11, x - 0.055).sum()


def test_losses_have_the_values_of_their_equations(storage):
    model = _model("MODEL.REPPOINTS.TRANSFORM", "minmax")
    anchors = _anchors(model)
    places = Boxes.cat(anchors).tensor.double().numpy()
    generator = np.random.RandomState(0)
    sizes = [16, 8, 4, 2, 1]
    rows = {n: [generator.randn(2, n, size, size) * 2 for size in sizes] for n in (3, 18, 36)}
    first = [x[:, 18:] for x in rows[36]]
    predictions = [
        [torch.tensor(x, dtype=torch.float32) for x in maps] for maps in (rows[3], rows[18], first)
    ]
    objects = [[[20.0, 20, 60, 70], [64, 30, 90, 50]], [[8.0, 8, 120, 100]]]
    classes, instances = [[2, 0], [1]], []
    for boxes, kinds in zip(objects, classes):
        image = Instances((128, 128), gt_boxes=Boxes(torch.tensor(boxes)))
        image.gt_classes = torch.tensor(kinds)
        instances.append(image)
    features = [torch.zeros(2, 1, size, size) for size in sizes]
    found = model.forward_training(None, features, predictions, instances)

    def flat(maps):
        return np.concatenate([x.reshape(*x.shape[:2], -1).transpose(0, 2, 1) for x in maps], 1)

    def box(points, place):
        y, x = points[::2], points[1::2]
        side, center = place[2] - place[0], (place[:2] + place[2:]) / 2
        corners = np.array([x.min(), y.min(), x.max(), y.max()])
        return np.tile(center, 2) + side * corners

    logits, last, start = flat(rows[3]), flat(rows[18]), flat(first)
    sums, counts = dict.fromkeys(("cls", "first", "loc"), 0.0), {"first": 0, "loc": 0}
    for image in range(2):
        gt = instances[image].gt_boxes
        boxes = np.array([box(p, place) for p, place in zip(start[image], places)])
        owners = {
            "first": nearest_places(anchors, gt).tolist(),
            "loc": overlapping_places(torch.tensor(boxes, dtype=torch.float32), gt).tolist(),
        }
        for name, points in (("first", start), ("loc", last)):
            counts[name] += sum(owner >= 0 for owner in owners[name])
            for place, owner in enumerate(owners[name]):
                if owner >= 0:
                    side = 4 * (places[place][2] - places[place][0])
                    apart = box(points[image, place], places[place]) - objects[image][owner]
                    sums[name] += _smooth(apart / side)
        for place, owner in enumerate(owners["loc"]):
            for kind in range(3) if owner != -2 else ():
                p = _sigmoid(logits[image, place, kind])
                if owner >= 0 and kind == classes[image][owner]:
                    sums["cls"] -= 0.25 * (1 - p) ** 2 * np.log(p)
                else:
                    sums["cls"] -= 0.75 * p**2 * np.log(1 - p)
    assert min(counts.values()) >= 3
    expected = {
        "loss_reppoints_cls": sums["cls"] / counts["loc"],
        "loss_reppoints_first": 0.5 * sums["first"] / counts["first"],
        "loss_reppoints_loc": sums["loc"] / counts["loc"],
    }
    assert found.keys() == expected.keys()
    for name, term in found.items():
        assert term.item() == pytest.approx(expected[name], rel=1e-4), name


def test_the_lazy_config_describes_the_same_model():
    cfg = load_config(STUDENT, SMALL)
    one, other = build_model(cfg).eval(), instantiate(lazy_reppoints(cfg)).eval()
    other.load_state_dict(one.state_dict())
    assert one.backbone.top_block.in_feature == "res5"
    assert one.backbone.top_block.p6.weight.shape[1] == 512
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        features = [
            [m.backbone(image)[level] for level in m.head_in_features] for m in (one, other)
        ]
        for own, others in zip(*(m.head(x) for m, x in zip((one, other), features))):
            assert all(torch.equal(*pair) for pair in zip(own, others))
    with pytest.raises(NotImplementedError, match="an exported RepPoints is for inference"):
        other.forward_training()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_CONVS", "0", "expected 1 or more, got 0"),
        ("NUM_POINTS", "8", "expected the square of an odd number, e.g. 9, got 8"),
        ("NUM_POINTS", "16", "expected the square of an odd number, e.g. 9, got 16"),
        ("TRANSFORM", "mean", "expected 'moment' or 'minmax', got 'mean'"),
    ],
)
def test_a_value_that_no_reppoints_has_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=f"MODEL.REPPOINTS.{key}: {message}"):
        _model(f"MODEL.REPPOINTS.{key}", value)
