"""The training images in an order that a resumed run goes on with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler


class ContinuedSampler(Sampler[int]):
    """The stream of another sampler without its first entries.

    Args:
        sampler: an infinite one.
        skipped: number of entries that this process has used already.
    """

    def __init__(self, sampler: TrainingSampler, skipped: int) -> None:
        self.sampler = sampler
        self.skipped = skipped

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.skipped, None)


def training_loader(cfg: CfgNode, start: int) -> DataLoader:
    """Return detectron2's training loader, from the images of step ``start`` on.

    The order depends on ``SEED`` alone (where it is not negative). With
    ``DATALOADER.ASPECT_RATIO_GROUPING`` images that waited for a partner when a run stopped are
    passed over.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return build_detection_train_loader(cfg)
    dataset = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    seed = cfg.SEED if cfg.SEED >= 0 else None
    used = start * cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    sampler = ContinuedSampler(TrainingSampler(len(dataset), seed=seed), used)
    return build_detection_train_loader(cfg, dataset=dataset, sampler=sampler)
