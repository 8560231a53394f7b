"""Every pair of architectures on real COCO images: train, kill, resume, evaluate, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling import META_ARCH_REGISTRY

from detection import export, train_net
from detection.config import PROJECT, load_config

pytestmark = pytest.mark.slow

COCO = PROJECT / "configs" / "detection" / "coco"
R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
PAIRS = {
    "retinanet": ("retinanet_r50/from_r101_pcka", R18),
    "faster_rcnn": ("faster_rcnn_r50/from_r101_pcka_mimic", R18),
    "cascade_mask_rcnn": ("mask_rcnn_r50/from_cascade_x101_pcka", R18),
    "fcos": ("fcos_r50/from_r101_pcka", R18),
    "gfl": ("gfl_r50/from_r101_pcka", R18),
    "reppoints": ("reppoints_r50/from_r101_pcka", R18),
}
SMALL_TEACHER = str([*R18[:1], 18, *R18[2:3], 64, "MODEL.RESNETS.NUM_GROUPS", 1,
                     "MODEL.RESNETS.WIDTH_PER_GROUP", 64])  # fmt: skip

# A few steps from random weights give no box a score above the usual thresholds.
ALL_BOXES = [
    "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0",
    "MODEL.FCOS.SCORE_THRESH_TEST", "0.0",
    "MODEL.GFL.SCORE_THRESH_TEST", "0.0",
    "MODEL.REPPOINTS.SCORE_THRESH_TEST", "0.0",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Fifty images each to train and to test on."""
    archive = Path(os.environ.get("PCKA_TEST_DATA", ""), "tiny_coco.zip")
    if "PCKA_TEST_DATA" not in os.environ or not archive.exists():
        pytest.skip("PCKA_TEST_DATA holds no tiny_coco.zip")
    folder = tmp_path_factory.mktemp("coco")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder / "tiny_coco"


def _arguments(name, coco, folder, steps, *more):
    config, student = PAIRS[name]
    keys = [
        *student,
        "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0",
        "MODEL.RESNETS.NORM", "BN",
        "DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", "True",
        "DISTILL.TEACHER.OPTS", SMALL_TEACHER, "DISTILL.PCKA.PATCH_SIZES", "[4, 4, 2, 1]",
        "DISTILL.LOG_PERIOD", "1",
        "INPUT.MIN_SIZE_TRAIN", "[128]", "INPUT.MAX_SIZE_TRAIN", "192",
        "INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "192",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", str(steps), "SOLVER.BASE_LR", "0.001",
        "SOLVER.CHECKPOINT_PERIOD", "1", "DATALOADER.NUM_WORKERS", "0", "SEED", "0",
        "OUTPUT_DIR", str(folder),
    ]  # fmt: skip
    for split, part in (("TRAIN", "train"), ("TEST", "val")):
        annotations = str(coco / "annotations" / f"instances_{part}2017.json")
        images = str(coco / f"{part}2017")
        for leaf, value in (("NAME", f"tiny_{part}"), ("JSON", annotations), ("IMAGES", images)):
            keys += [f"DATASETS.COCO_{split}.{leaf}", value]
    return ["--config-file", str(COCO / f"{config}.yaml"), *more, *keys]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_killed_resumes_evaluates_and_exports(
    tmp_path, coco, name, assert_same_boxes_in_plain_detectron2
):
    script = str(PROJECT / "detection" / "train_net.py")
    command = [sys.executable, "-W", "ignore", script, *_arguments(name, coco, tmp_path, 500)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "model_0000001.pth").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    tag = (tmp_path / "last_checkpoint").read_text()
    done = torch.load(tmp_path / tag, weights_only=True)["iteration"] + 1
    results = train_net.main(_arguments(name, coco, tmp_path, done + 2, "--resume"))
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == done + 1
    assert "AP" in results["bbox"]
    assert ("segm" in results) == (name == "cascade_mask_rcnn")
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    levels = [key for entry in logged for key in entry if key.startswith("distill_grad/")]
    assert len(set(levels)) == 4
    assert all(entry[key] > 0 for entry in logged for key in entry if key in levels)
    config, *arguments = _arguments(name, coco, tmp_path, 1, *ALL_BOXES)[1:]
    weights = str(tmp_path / "model_final.pth")
    where = ["--weights", weights, "--output", str(tmp_path / "out")]
    exported = export.main(["--config-file", config, *where, *arguments])
    cfg = load_config(config, arguments)
    student = META_ARCH_REGISTRY.get(cfg.DISTILL.STUDENT)(cfg)
    student.load_state_dict(torch.load(weights, weights_only=True)["model"])
    picture = read_image(sorted((coco / "val2017").iterdir())[0], format=cfg.INPUT.FORMAT)
    image = torch.as_tensor(picture.transpose(2, 0, 1).copy())
    assert_same_boxes_in_plain_detectron2(exported, student, image)
