from __future__ import annotations

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure
from torch import nn

from detection.data import register_datasets
from detection.pictures import MISS, TRUTH, _draw, draw_found, match


class _Nothing(nn.Module):
    """A detector that finds nothing, in detectron2's form."""

    def __init__(self, real):
        super().__init__()
        self.real = real

    def forward(self, batch):
        (found,) = self.real(batch)
        return [{"instances": found["instances"][:0]}]


def test_a_column_for_the_truth_and_each_model(tmp_path, build, small_config):
    cfg = small_config("student", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    register_datasets(cfg)
    model = build(config="student").eval()
    draw_found(cfg, {"one": model, "none": _Nothing(model)}, tmp_path / "p.png", images=2)
    picture = read_image(str(tmp_path / "p.png"), "RGB")
    assert 1.3 < picture.shape[1] / picture.shape[0] < 3 / 2  # the legend below
    thirds = np.array_split(picture[40:-80], 3, axis=1)
    nearest = {
        name: [((part - [*bytes.fromhex(colour[1:])]) ** 2).sum(axis=2).min() for part in thirds]
        for name, colour in {"truth": TRUTH, "miss": MISS}.items()
    }
    assert nearest["truth"][0] < 500 < min(nearest["truth"][1:])
    assert nearest["miss"][2] < 500 < nearest["miss"][0]  # who finds nothing misses all


def instances(*detections):
    """Of (box, class, score)."""
    boxes, classes, scores = zip(*detections)
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(np.array(boxes), dtype=torch.float32)),
        pred_classes=torch.tensor(classes),
        scores=torch.tensor(scores),
    )


def test_a_hit_is_of_the_class_overlaps_enough_and_takes_its_object_alone():
    truth = Boxes(torch.tensor([[0.0, 0, 10, 10], [50, 50, 70, 70], [80, 80, 90, 90]]))
    found = instances(
        ([0, 0, 10, 9], 1, 0.6),  # the second best of the first object
        ([0, 0, 10, 8], 1, 0.9),
        ([50, 50, 70, 70], 2, 0.8),  # of another class
        ([80, 80, 90, 84], 1, 0.7),  # overlaps by 0.4
    )
    hits, taken = match(found, truth, torch.tensor([1, 1, 1]))
    assert hits.tolist() == [False, True, False, False]
    assert taken.tolist() == [True, False, False]


def test_hits_are_those_of_a_plain_computation():
    generator = np.random.default_rng(0)

    def some(count):
        corners = generator.uniform(0, 60, (count, 2))
        return np.hstack([corners, corners + generator.uniform(15, 40, (count, 2))])

    truth, kinds = some(12), generator.integers(2, size=12)
    # Near the objects, and each of them twice.
    boxes = np.vstack([truth + generator.normal(0, 3, truth.shape) for _ in range(2)])
    classes, scores = np.concatenate([kinds, kinds]), generator.permutation(24) / 24
    expected = np.zeros(24, dtype=bool)
    taken = set()
    for index in np.argsort(-scores):
        best, chosen = 0.0, None
        for number, box in enumerate(truth):
            low, high = np.maximum(box[:2], boxes[index, :2]), np.minimum(box[2:], boxes[index, 2:])
            shared = np.prod(np.clip(high - low, 0, None))
            both = sum(np.prod(b[2:] - b[:2]) for b in (box, boxes[index])) - shared
            free = number not in taken and kinds[number] == classes[index]
            if free and shared / both > best:
                best, chosen = shared / both, number
        if best >= 0.5:
            expected[index] = True
            taken.add(chosen)
    found = instances(*zip(boxes, classes.tolist(), scores.tolist()))
    hits, found_too = match(found, Boxes(torch.tensor(truth)), torch.tensor(kinds))
    assert hits.tolist() == expected.tolist() and 0 < expected.sum() < 24
    assert {*torch.nonzero(found_too).flatten().tolist()} == taken


def test_without_objects_every_detection_is_a_false_alarm():
    found = instances(([0, 0, 10, 9], 1, 0.6))
    hits, taken = match(found, Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64))
    assert hits.tolist() == [False] and len(taken) == 0


def test_labels_stand_outside_of_their_boxes():
    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.imshow(np.zeros((100, 100, 3)))
    boxes = Boxes(torch.tensor([[20.0, 40, 60, 80], [10, 1, 40, 30]]))  # the second: no room above
    _draw(axes, boxes, ["cat", "dog"], TRUTH)
    figure.canvas.draw()
    for text, (left, top, _, bottom) in zip(axes.texts, boxes.tensor.tolist()):
        extent = text.get_window_extent().transformed(axes.transData.inverted())
        assert extent.y0 <= top or extent.y1 >= bottom  # the vertical axis points down
        low, high = sorted((extent.y0, extent.y1))
        assert high <= top + 0.5 or low >= bottom - 0.5
        assert abs(extent.x0 - left) < 2 and text.get_bbox_patch() is None
