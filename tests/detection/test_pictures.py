from __future__ import annotations

import numpy as np
from detectron2.data.detection_utils import read_image
from torch import nn

from detection.data import register_datasets
from detection.pictures import draw_detections


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
    draw_detections(cfg, {"one": model, "none": _Nothing(model)}, tmp_path / "p.png", images=2)
    picture = read_image(str(tmp_path / "p.png"), "RGB")
    assert picture.shape[1] / picture.shape[0] == 3 / 2
    thirds = np.array_split(picture[40:], 3, axis=1)
    orange = [((part - [0xE6, 0x9F, 0x00]) ** 2).sum(axis=2).min() for part in thirds]
    assert orange[0] < 500  # the truth has boxes
    assert orange[2] > orange[0]  # who finds nothing has none
