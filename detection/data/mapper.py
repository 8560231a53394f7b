"""From a data set's entry to a model's input; errors name the file that cannot be read."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size, read_image

from detection.config import build, student_architecture
from detection.data.pixels import Labels
from detection.data.targets import SEGMENTER
from pcka.engine.config import ConfigError


class UnusableImageError(ConfigError):
    """An image, or its annotations, that cannot be used; the message names the file."""


class NamingMapper(DatasetMapper):
    """detectron2's mapper, with errors that name the image.

    Raises:
        UnusableImageError: a file is missing or broken, an image is too large to open or its size
            differs from the annotations, or annotations cannot be read.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.read(dataset_dict)
        except Exception as error:  # image libraries, NumPy and assertions raise many types
            raise UnusableImageError(
                f"{dataset_dict.get('file_name')}: the image or its annotations cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error

    def read(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read an entry as detectron2's mapper does."""
        return super().__call__(dataset_dict)


class PixelMapper(NamingMapper):
    """Images with the class of each pixel, for a ``SemanticSegmentor``.

    Unlike detectron2's mapper, it reads palette images, refuses classes that the model lacks, and
    crops after resizing, so that crops have one size at any scale. The classes are read only for
    training.
    """

    def __init__(self, cfg: CfgNode, is_train: bool) -> None:
        super().__init__(cfg, is_train)
        self.labels = Labels.of(cfg)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments of ``DatasetMapper``."""
        keywords: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            _, resize, *others = keywords["augmentations"]
            keys = cfg.INPUT.CROP
            keywords["augmentations"] = [resize, T.RandomCrop(keys.TYPE, keys.SIZE), *others]
        return keywords

    def read(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Return an entry with ``image`` and, for training, ``sem_seg``."""
        entry = dict(dataset_dict)
        labels = self.labels.read(entry["sem_seg_file_name"]) if self.is_train else None
        image = read_image(entry["file_name"], format=self.image_format)
        check_image_size(entry, image)
        given = T.AugInput(image, sem_seg=labels)
        self.augmentations(given)
        entry["image"] = torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        if labels is not None:
            entry["sem_seg"] = torch.as_tensor(given.sem_seg.astype("int64"))
        return entry


def make_mapper(cfg: CfgNode, *, training: bool) -> NamingMapper:
    """Return the mapper that reads a student's images.

    Raises:
        ConfigError: the keys of ``INPUT`` cannot be used.
    """
    kind = PixelMapper if student_architecture(cfg) == SEGMENTER else NamingMapper
    return build(partial(kind, is_train=training), cfg, "INPUT")
