"""From the DATA section to image sets."""

from __future__ import annotations

import numpy as np
import torch
from fvcore.common.config import CfgNode

from classification.data import cifar, digits  # noqa: F401  (register themselves)
from classification.data.folder import FolderSource
from classification.data.image_set import ImageSet, Source, balanced_order
from classification.data.registry import make_source
from classification.data.resident import ResidentSet
from classification.data.streaming import StreamingSet
from pcka.engine.config import ConfigError


def load_image_sets(cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and the images to evaluate on.

    With ``DATA.HOLDOUT`` the latter are held out of the training data and the test data is not
    touched; ``DATA.TRAIN_IMAGES`` then chooses among the rest. Both choices are class-balanced and
    depend on ``DATA.SPLIT_SEED`` alone.

    Raises:
        ConfigError: missing or damaged data, train and test of different classes, too few images,
            a resident set beyond ``DATA.MEMORY_GB``, a contradicting ``DATA.NUM_CLASSES``, or
            ``DATA.STREAM`` where there are no files to stream.
    """
    train = _source(cfg, "train")
    held_out, kept = _split(cfg, train)
    if cfg.DATA.HOLDOUT:
        test, tested = train, held_out
    else:
        test = _source(cfg, "test")
        tested = np.arange(len(test.labels))
        if test.classes != train.classes:
            differing = sorted(set(train.classes) ^ set(test.classes))
            raise ConfigError(
                "DATA.ROOT: expected the same classes for training and evaluation, "
                f"got these in one of them only: {', '.join(differing)}"
            )
    _check_memory(cfg, len(kept) + len(tested))
    return (
        _open(cfg, train, kept, evaluated=False),
        _open(cfg, test, tested, evaluated=True),
    )


def load_evaluation_set(cfg: CfgNode) -> ImageSet:
    """Return the images to evaluate on, as :func:`load_image_sets` does, and read no others."""
    if cfg.DATA.HOLDOUT:
        source = _source(cfg, "train")
        chosen, _ = _split(cfg, source)
    else:
        source = _source(cfg, "test")
        chosen = np.arange(len(source.labels))
    _check_memory(cfg, len(chosen))
    return _open(cfg, source, chosen, evaluated=True)


def _source(cfg: CfgNode, split: str) -> Source:
    data = cfg.DATA
    source = make_source(data, split)
    if data.STREAM and not isinstance(source, FolderSource):
        raise ConfigError(
            f"DATA.STREAM: only image files stream (DATA.NAME folder), got {data.NAME!r}; set it "
            "to False"
        )
    if data.NUM_CLASSES not in (0, len(source.classes)):
        raise ConfigError(
            f"DATA.NUM_CLASSES: {data.NUM_CLASSES} classes are configured, the data has "
            f"{len(source.classes)}; set it to 0 to take the data's"
        )
    return source


def _split(cfg: CfgNode, train: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices held out of the training data and those trained on."""
    holdout, wanted, total = cfg.DATA.HOLDOUT, cfg.DATA.TRAIN_IMAGES, len(train.labels)
    if holdout + max(wanted, 1) > total:
        raise ConfigError(
            f"DATA.HOLDOUT and DATA.TRAIN_IMAGES: {holdout} + {wanted} images are asked for, "
            f"the training data has {total}"
        )
    order = balanced_order(train.labels, cfg.DATA.SPLIT_SEED)
    last = holdout + wanted if wanted else total
    return np.sort(order[:holdout]), np.sort(order[holdout:last])


def _check_memory(cfg: CfgNode, images: int) -> None:
    gigabytes = images * 3 * cfg.DATA.IMAGE_SIZE**2 / 1e9
    if gigabytes > cfg.DATA.MEMORY_GB and not cfg.DATA.STREAM:
        raise ConfigError(
            f"DATA.MEMORY_GB: {images} images of {cfg.DATA.IMAGE_SIZE} pixels need "
            f"{gigabytes:.3g} GB, allowed are {cfg.DATA.MEMORY_GB:.3g}; raise it if the memory is "
            "there, set DATA.STREAM True to read image files batch by batch instead, or take a "
            "smaller DATA.IMAGE_SIZE or a subset by DATA.TRAIN_IMAGES"
        )


def _open(cfg: CfgNode, source: Source, chosen: np.ndarray, *, evaluated: bool) -> ImageSet:
    """Return the chosen images of a source, resident or streaming as DATA.STREAM says."""
    labels, data = torch.from_numpy(source.labels[chosen]), cfg.DATA
    resize = data.RESIZE or data.IMAGE_SIZE
    if not isinstance(source, FolderSource):
        if data.RESIZE:
            raise ConfigError(
                f"DATA.RESIZE: is for images of a folder, DATA.NAME is {data.NAME!r}; set it to 0"
            )
        return ResidentSet(source.read(chosen), labels, source.classes)
    if resize < data.IMAGE_SIZE:
        raise ConfigError(
            f"DATA.RESIZE: expected at least DATA.IMAGE_SIZE ({data.IMAGE_SIZE}), which is cut out "
            f"of it, got {resize}; 0 takes DATA.IMAGE_SIZE"
        )
    if data.STREAM:
        files = source.files.take(chosen)
        size = (data.IMAGE_SIZE, resize)
        return StreamingSet(files, labels, source.classes, *size, workers=data.WORKERS)
    images = source.read_resized(chosen, resize) if evaluated else source.read(chosen)
    return ResidentSet(images, labels, source.classes)
