"""The training images, in an order that a resumed run continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from detection.config import build
from detection.data.mapper import make_mapper
from detection.data.targets import Entries
from pcka.engine.config import ConfigError


@dataclass(eq=False)
class ContinuedSampler(Sampler[int]):
    """The stream of an infinite sampler without the entries that were already used."""

    sampler: Sampler[int]
    skipped: int

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.skipped, None)


def training_loader(cfg: CfgNode, dataset: Entries, start: int) -> DataLoader:
    """Return detectron2's training loader, starting at the images of step ``start``.

    The order depends only on ``SEED`` (unless it is negative). With
    ``DATALOADER.ASPECT_RATIO_GROUPING``, images that were waiting for a partner when a run stopped
    are skipped.

    Raises:
        ConfigError: the keys of ``DATALOADER`` or ``INPUT`` cannot be used.
    """
    return build(partial(_loader, dataset=dataset, start=start), cfg, "DATALOADER")


def _loader(cfg: CfgNode, dataset: Entries, start: int) -> DataLoader:
    used = start * cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    sampler = ContinuedSampler(_sampler(cfg, dataset), used)
    mapper = make_mapper(cfg, training=True)
    return build_detection_train_loader(cfg, dataset=dataset, sampler=sampler, mapper=mapper)


def _sampler(cfg: CfgNode, dataset: Entries) -> Sampler[int]:
    keys, seed = cfg.DATALOADER, cfg.SEED if cfg.SEED >= 0 else None
    if keys.SAMPLER_TRAIN == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=seed)
    if keys.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, keys.REPEAT_THRESHOLD
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ConfigError(
        "DATALOADER.SAMPLER_TRAIN: expected 'TrainingSampler' or 'RepeatFactorTrainingSampler', "
        f"got {keys.SAMPLER_TRAIN!r}"
    )
