"""The detectors of this project's own learn one image, and find its objects."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou

from detection.config import PROJECT, load_config

COCO = PROJECT / "configs" / "detection" / "coco"
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0",
    "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.FPN.NORM", "",
    "MODEL.GFL.NUM_CLASSES", "3", "MODEL.REPPOINTS.NUM_CLASSES", "3",
]  # fmt: skip


@pytest.fixture
def one_thread():
    """The order of sums, and with it so short a training, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pair", ["gfl_r50", "reppoints_r50"])
def test_an_image_is_learned_and_its_objects_are_found(storage, pair):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(80, (3, 128, 128), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[16.0, 24, 56, 64], [72, 60, 112, 120]])
    for channel, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[channel, y0:y1, x0:x1] += 150
    instances = Instances((128, 128), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]))
    batch = [{"image": image, "height": 128, "width": 128, "instances": instances}]
    torch.manual_seed(0)
    model = build_model(load_config(str(COCO / pair / "student.yaml"), SMALL)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(80):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    with torch.no_grad():
        found = model.eval()(batch)[0]["instances"][:5]
    assert history[-1] < 0.5 * max(history[:5])
    best = pairwise_iou(found.pred_boxes, Boxes(boxes))
    assert best.amax(0).min() > 0.5, (best, found.scores)
    assert found.pred_classes[best.argmax(0)].tolist() == [0, 2]
