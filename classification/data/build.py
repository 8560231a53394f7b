"""Image sets from the DATA section."""

from __future__ import annotations

import numpy as np
from fvcore.common.config import CfgNode

from classification.data.image_files import FileSource
from classification.data.image_set import ImageSet, balanced_order
from classification.data.source import Source, make_source
from pcka.distributed import from_first_process, rank
from pcka.engine.config import ConfigError

SHOWN = 5  # classes listed in a message


def load_image_sets(cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
    """Return the training images and the evaluation images.

    With ``DATA.HOLDOUT`` the latter are held out of the training data and the test data is not
    used; ``DATA.TRAIN_IMAGES`` then selects from the rest. Both selections are class-balanced and
    depend only on ``DATA.SPLIT_SEED``. Only the first of several processes downloads.

    Raises:
        ConfigError: missing or damaged data, different classes in train and test, too few images, a
            resident set beyond ``DATA.MEMORY_GB``, a ``DATA.NUM_CLASSES`` that contradicts the
            data, or ``DATA.STREAM`` without image files.
    """
    if not cfg.DATA.DOWNLOAD:
        return _load(cfg)
    sets = _load(cfg) if rank() == 0 else None
    from_first_process(None)  # wait for it
    return sets or _load(cfg)


def _load(cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
    train = _source(cfg, "train")
    held_out, kept = _split(cfg, train)
    if cfg.DATA.HOLDOUT:
        test, tested = train, held_out
    else:
        test = _source(cfg, "test")
        tested = np.arange(len(test.labels))
        if test.classes != train.classes:
            raise ConfigError(_differing(train, test))
    _check_memory(cfg, len(kept) + len(tested))
    return (
        train.open(cfg.DATA, kept, evaluated=False),
        test.open(cfg.DATA, tested, evaluated=True),
    )


def load_evaluation_set(cfg: CfgNode) -> ImageSet:
    """Return the evaluation images of :func:`load_image_sets`, without reading any others."""
    if cfg.DATA.HOLDOUT:
        source = _source(cfg, "train")
        chosen, _ = _split(cfg, source)
    else:
        source = _source(cfg, "test")
        chosen = np.arange(len(source.labels))
    _check_memory(cfg, len(chosen))
    return source.open(cfg.DATA, chosen, evaluated=True)


def _source(cfg: CfgNode, split: str) -> Source:
    data = cfg.DATA
    source = make_source(data, split)
    if data.NUM_CLASSES not in (0, len(source.classes)):
        raise ConfigError(
            f"DATA.NUM_CLASSES: {data.NUM_CLASSES} classes are configured, the data has "
            f"{len(source.classes)}; set it to 0 to use the data's"
        )
    return source


def _differing(train: Source, test: Source) -> str:
    """Describe how the classes of two parts differ, with an image of each unshared class."""
    alone = []
    for part, source, other in (("training", train, test), ("evaluation", test, train)):
        names = [name for name in source.classes if name not in other.classes]
        shown = [f"{name!r}{_first_image(source, name)}" for name in names[:SHOWN]]
        more = [f"{len(names) - SHOWN} more"] * (len(names) > SHOWN)
        alone += [f"only the {part} images have {', '.join(shown + more)}"] * bool(names)
    return (
        "DATA.ROOT: expected the same classes and order for training and evaluation; "
        f"{' and '.join(alone) or 'their order differs'}; correct the labels, or add what is "
        "missing (for tables and shards, ROOT/classes.txt names the classes of both)"
    )


def _first_image(source: Source, name: str) -> str:
    """Return the path of a class's first image, in brackets; "" if there are no files or images."""
    positions = np.flatnonzero(source.labels == source.classes.index(name))
    if not isinstance(source, FileSource) or not len(positions):
        return ""
    return f" (first {source.files.path(int(positions[0]))})"


def _split(cfg: CfgNode, train: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices held out of the training data and those trained on."""
    holdout, wanted, total = cfg.DATA.HOLDOUT, cfg.DATA.TRAIN_IMAGES, len(train.labels)
    if holdout + max(wanted, 1) > total:
        raise ConfigError(
            f"DATA.HOLDOUT and DATA.TRAIN_IMAGES: {holdout} + {wanted} images are requested, "
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
            f"{gigabytes:.3g} GB, but the limit is {cfg.DATA.MEMORY_GB:.3g}; raise it, set "
            "DATA.STREAM True (image files), or reduce DATA.IMAGE_SIZE or DATA.TRAIN_IMAGES"
        )
