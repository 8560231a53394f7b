"""Images without any object: everything in them is background."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import BitMasks

from detection.config import PROJECT, load_config

COCO = PROJECT / "configs" / "detection" / "coco"
SMALL_R18 = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
]  # fmt: skip


@pytest.fixture
def student():
    """``student(pair)``: the student of a folder under ``configs/detection/coco``."""

    def make(pair):
        torch.manual_seed(0)
        return build_model(load_config(str(COCO / pair / "student.yaml"), SMALL_R18)).train()

    return make


@pytest.mark.parametrize(
    "pair",
    ["retinanet_r50", "faster_rcnn_r50", "mask_rcnn_r50", "fcos_r50", "gfl_r50", "reppoints_r50"],
)
@pytest.mark.parametrize("kept", [slice(0, 2), slice(1, 2)], ids=["one of two", "the only one"])
def test_every_student_learns_from_them(student, batch, storage, pair, kept):
    for entry in batch:
        instances = entry["instances"]
        instances.gt_masks = BitMasks(torch.ones(len(instances), *instances.image_size))
    model = student(pair)
    terms = model(batch[kept])
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values()), terms
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in gradients)
    assert any(grad.norm() > 0 for grad in gradients)
    boxes = [name for name in terms if "reg" in name or "loc" in name]
    assert boxes
    assert all((terms[name] > 0) == (kept.start == 0) for name in boxes if name != "loss_rpn_loc")


@pytest.mark.parametrize("release", ["0.6", "main"])
def test_all_anchors_of_fcos_are_background_and_other_images_stay_as_they_are(
    student, batch, monkeypatch, release
):
    if release == "main":  # which gives tensors, where 0.6 gives Boxes
        label = FCOS.label_anchors

        def label_anchors(*given):
            labels, boxes = label(*given)
            return labels, [image.tensor for image in boxes]

        monkeypatch.setattr(FCOS, "label_anchors", label_anchors)
    model = student("fcos_r50")
    features = [torch.zeros(1, 1, 128 // stride, 128 // stride) for stride in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    full, empty = (entry["instances"] for entry in batch)
    labels, boxes = model.label_anchors(anchors, [full, empty])
    expected, expected_boxes = FCOS.label_anchors(model, anchors, [full])
    assert torch.equal(labels[0], expected[0])
    assert type(boxes[0]) is type(expected_boxes[0])
    one, other = (getattr(found, "tensor", found) for found in (boxes[0], expected_boxes[0]))
    assert torch.equal(one, other)
    assert (labels[0] != model.num_classes).any()
    assert (labels[1] == model.num_classes).all()
