"""Evaluation of a student on the test sets."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    SemSegEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from torch import nn

from detection.config import student_architecture
from detection.data.mapper import make_mapper
from detection.data.targets import SEGMENTER, SEGMENTERS
from pcka.modes import evaluation_mode

COCO_DETECTIONS = 100  # top detections per image that COCO's metrics count
EVERY_AREA = (0.0, 1e5**2)
AREAS = {"APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, 1e5**2)}  # COCO's
METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


class ObjectEvaluator(COCOEvaluator):
    """detectron2's COCO evaluation, with metrics of 0 for a model that detects nothing.

    detectron2 returns NaN in that case. Here only metrics without any object in the set are NaN,
    which is COCO's own rule for models that detect something. The ids of the objects may be any:
    they are numbered from 1 here, because COCO's evaluation takes the id 0 as "no object", and
    cannot read ids that are not numbers.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for number, truth in enumerate(self._coco_api.dataset.get("annotations", []), 1):
            truth["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is not None:
            return super()._derive_coco_results(coco_eval, iou_type, class_names)
        self._logger.warning("The model detects nothing: its average precision is 0")
        truths = [truth for truth in self._coco_api.anns.values() if _counts(truth, iou_type)]
        found = {}
        for metric in METRICS[iou_type]:
            least, most = AREAS.get(metric, EVERY_AREA)
            found[metric] = _zero_if(any(least <= truth["area"] <= most for truth in truths))
        if class_names is not None and len(class_names) > 1:
            ids = self._metadata.thing_dataset_id_to_contiguous_id
            classes = {ids[truth["category_id"]] for truth in truths}
            for number, name in enumerate(class_names):
                found[f"AP-{name}"] = _zero_if(number in classes)
        return found


def _counts(truth: dict[str, Any], iou_type: str) -> bool:
    """Whether COCO's evaluation counts this object."""
    if iou_type == "keypoints" and not truth.get("num_keypoints"):
        return False
    return not truth.get("iscrowd", 0)


def _zero_if(asked_for: bool) -> float:
    return 0.0 if asked_for else math.nan


def evaluate(cfg: CfgNode, student: nn.Module) -> dict[str, Any]:
    """Return the student's metrics on ``DATASETS.TEST``; only the first process gets any.

    Detections are evaluated with COCO's metrics on the top 100 of each image, or the top
    ``TEST.DETECTIONS_PER_IMAGE`` if larger; pixel classes by their intersection over union.
    """
    results: dict[str, Any] = {}
    for name in cfg.DATASETS.TEST:
        # One folder per set: the evaluators' files have the same names for all sets.
        folder = Path(cfg.OUTPUT_DIR, "inference", *([name] if len(cfg.DATASETS.TEST) > 1 else []))
        loader = build_detection_test_loader(cfg, name, mapper=make_mapper(cfg, training=False))
        with evaluation_mode(student):  # detectron2 leaves all modules in one mode afterwards
            found = inference_on_dataset(student, loader, _evaluators(cfg, name, str(folder))) or {}
        if comm.is_main_process():
            print_csv_format(found)
        results.update(found if len(cfg.DATASETS.TEST) == 1 else {name: found})
    return results


def _evaluators(cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    architecture = student_architecture(cfg)
    found: list[DatasetEvaluator] = []
    if architecture != SEGMENTER:
        found.append(
            ObjectEvaluator(
                name,
                output_dir=folder,
                max_dets_per_image=max(COCO_DETECTIONS, cfg.TEST.DETECTIONS_PER_IMAGE),
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            )
        )
    if architecture in SEGMENTERS:
        found.append(SemSegEvaluator(name, output_dir=folder))
    return found


def without_nan(results: Any) -> Any:
    """Return a nested dict of metrics without those that could not be computed (NaN)."""
    if isinstance(results, dict):
        known = {name: without_nan(found) for name, found in results.items()}
        return {name: found for name, found in known.items() if found is not None}
    return None if math.isnan(results) else results
