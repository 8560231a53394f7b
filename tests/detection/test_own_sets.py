"""Boxes in the formats of VOC and YOLO: trained on, resumed and evaluated as COCO's are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from detection import train_net

pytestmark = pytest.mark.slow


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "loss" in k} for line in lines if "total_loss" in line
    ]


@pytest.mark.parametrize("form", ["VOC", "YOLO"])
def test_a_run_is_that_on_the_coco_file_and_goes_on_bit_for_bit(
    tmp_path, arguments, own_boxes, own_keys, form
):
    keys = own_keys(form, own_boxes(form))
    coco = train_net.main(arguments(tmp_path / "coco", 4))
    own = train_net.main(arguments(tmp_path / "whole", 4, *keys))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "model_final.pth").unlink()
    (tmp_path / "cut" / "last_checkpoint").write_text("model_0000001.pth")
    again = train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"]))
    whole, cut = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert own == again
    assert own["bbox"] == pytest.approx(coco["bbox"], abs=0.5, nan_ok=True)
    for ours, theirs in zip(_losses(tmp_path / "whole"), _losses(tmp_path / "coco"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    weights = ("MODEL.WEIGHTS", str(tmp_path / "whole" / "model_final.pth"))
    found = train_net.main(arguments(tmp_path / "whole", 4, *keys, *weights, flags=["--eval-only"]))
    assert found["bbox"] == pytest.approx(own["bbox"], nan_ok=True)
