"""The metrics of models that detect nothing, and of those that name every pixel's class."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from detection.data import register_datasets
from detection.data.mapper import UnusableImageError
from detection.evaluation import ObjectEvaluator, evaluate, without_nan

OBJECTS = [  # class, area, crowd
    (1, 100.0, 0),
    (2, 2000.0, 0),
    (3, 20000.0, 1),
]


@pytest.fixture
def make_set(tmp_path, small_config):
    """From annotations of one image of 200x200 pixels to the configuration of a test set."""

    def make(annotations, *more):
        Image.new("RGB", (200, 200)).save(tmp_path / "a.png")
        images = [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}]
        categories = [{"id": number + 1, "name": f"c{number}"} for number in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "test.json").write_text(json.dumps(content))
        described = {"NAME": "few_objects", "JSON": tmp_path / "test.json", "IMAGES": tmp_path}
        keys = [word for k, v in described.items() for word in (f"DATASETS.COCO_TEST.{k}", str(v))]
        cfg = small_config("student", *keys, "OUTPUT_DIR", str(tmp_path / "out"), *more)
        register_datasets(cfg, training=False)
        DatasetCatalog.get("few_objects")  # fills the metadata, as a loader does
        return cfg

    yield make
    DatasetCatalog.remove("few_objects")
    MetadataCatalog.remove("few_objects")


@pytest.fixture
def test_set(make_set):
    """The configuration of a set with a small and a middling object, and a crowd."""
    return make_set(
        [
            {"id": number + 1, "image_id": 1, "category_id": kind, "area": area, "iscrowd": crowd,
             "bbox": [5, 5, area**0.5, area**0.5], "num_keypoints": 0}
            for number, (kind, area, crowd) in enumerate(OBJECTS)
        ]
    )  # fmt: skip


def _evaluated(tmp_path, tasks, *boxes):
    evaluator = ObjectEvaluator("few_objects", tasks=tasks, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    found = Instances((200, 200))
    found.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    found.scores = torch.ones(len(boxes))
    found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    return evaluator.evaluate()


def test_a_model_that_detects_nothing_has_the_figures_of_one_that_detects_nothing_right(
    tmp_path, test_set
):
    nothing = _evaluated(tmp_path, ("bbox",))["bbox"]
    wrong = _evaluated(tmp_path, ("bbox",), [150.0, 150.0, 190.0, 190.0])["bbox"]
    assert nothing["AP"] == nothing["AP50"] == nothing["APs"] == nothing["AP-c1"] == 0
    assert math.isnan(nothing["APl"])  # the only large object is a crowd
    assert math.isnan(nothing["AP-c5"])
    assert str(nothing) == str(wrong)


class _FindsNothing(torch.nn.Module):
    def forward(self, batch):
        found = Instances((200, 200), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
        found.pred_classes = torch.zeros(0, dtype=torch.int64)
        return [{"instances": found} for _ in batch]


def test_a_run_asks_for_these_figures_and_names_what_it_cannot_read(tmp_path, test_set):
    assert evaluate(test_set, _FindsNothing())["bbox"]["AP"] == 0
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises((UnusableImageError, OSError), match=r"a\.png: the image or its"):
        evaluate(test_set, _FindsNothing())


class _FindsAll(torch.nn.Module):
    def __init__(self, boxes):
        super().__init__()
        self.boxes = torch.tensor(boxes, dtype=torch.float32)

    def forward(self, batch):
        found = Instances((200, 200), pred_boxes=Boxes(self.boxes))
        found.scores = torch.linspace(1, 0.5, len(self.boxes))
        found.pred_classes = torch.zeros(len(self.boxes), dtype=torch.int64)
        return [{"instances": found} for _ in batch]


@pytest.mark.parametrize(("per_image", "least", "most"), [(100, 60, 70), (150, 100, 100)])
def test_every_detection_that_a_model_may_give_is_judged(make_set, per_image, least, most):
    boxes = [[10 * x, 10 * y, 10 * x + 8, 10 * y + 8] for x in range(15) for y in range(10)]
    objects = [
        {"id": number + 1, "image_id": 1, "category_id": 1, "area": 64.0, "iscrowd": 0,
         "bbox": [x, y, 8, 8]}
        for number, (x, y, _, _) in enumerate(boxes)
    ]  # fmt: skip
    cfg = make_set(objects, "TEST.DETECTIONS_PER_IMAGE", str(per_image))
    assert least <= evaluate(cfg, _FindsAll(boxes))["bbox"]["AP"] <= most


@pytest.mark.parametrize("ids", [range(3), ("a", "b", "c")])
def test_objects_may_have_any_ids(make_set, ids):
    boxes = [[10, 10, 20, 20], [50, 50, 90, 90], [100, 100, 190, 190]]
    objects = [
        {"id": number, "image_id": 1, "category_id": 1, "area": (right - left) ** 2, "iscrowd": 0,
         "bbox": [left, left, right - left, right - left]}
        for number, (left, _, right, _) in zip(ids, boxes, strict=True)
    ]  # fmt: skip
    assert evaluate(make_set(objects), _FindsAll(boxes))["bbox"]["AP"] == pytest.approx(100)


def test_objects_without_keypoints_are_none_to_be_found(tmp_path, test_set):
    assert all(map(math.isnan, _evaluated(tmp_path, ("keypoints",))["keypoints"].values()))


def test_what_could_not_be_computed_is_left_out_at_every_depth():
    results = {"one": {"bbox": {"AP": 0.0, "APl": math.nan}}, "AR": math.nan}
    assert without_nan(results) == {"one": {"bbox": {"AP": 0.0}}}


class _LeftIsOne(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.BatchNorm2d(1).eval()

    def forward(self, batch):
        scores = torch.zeros(2, batch[0]["height"], batch[0]["width"])
        scores[1, :, :4] = 1
        return [{"sem_seg": scores}]


def test_a_segmenter_is_evaluated_by_its_pixels(tmp_path, small_config):
    truth = np.zeros((8, 8), np.uint8)
    truth[:, :2] = 1
    Image.fromarray(truth).save(tmp_path / "truth.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    files = {"file_name": str(tmp_path / "a.png"), "sem_seg_file_name": str(tmp_path / "truth.png")}
    name = "halves"
    DatasetCatalog.register(name, lambda: [{**files, "height": 8, "width": 8, "image_id": 1}])
    MetadataCatalog.get(name).set(stuff_classes=["zero", "one"], ignore_label=255)
    keys = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TEST", f"('{name}',)"]
    try:
        cfg = small_config("student", *keys, "OUTPUT_DIR", str(tmp_path / "out"))
        model = _LeftIsOne()
        found = evaluate(cfg, model)["sem_seg"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert found["pACC"] == 75
    assert found["IoU-one"] == 50
    assert (model.training, model.frozen.training) == (True, False)  # as before
