from __future__ import annotations

import itertools

import pytest

from detection.data import register_datasets
from detection.data.loader import training_loader
from detection.data.mapper import UnusableImageError
from detection.data.targets import training_set
from pcka.engine.config import ConfigError

STEPS = 12


def _images(cfg, start, stop):
    batches = itertools.islice(training_loader(cfg, training_set(cfg), start), stop - start)
    return [[entry["image_id"] for entry in batch] for batch in batches]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_a_later_start_goes_on_with_the_same_images(small_config, sampler):
    keys = ("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", "0.9")
    cfg = small_config("student", *keys)
    register_datasets(cfg)
    whole = _images(cfg, 0, STEPS)
    assert _images(cfg, 5, STEPS) == whole[5:]
    other = small_config("student", *keys, "SEED", "1")
    register_datasets(other)
    assert _images(other, 0, STEPS) != whole


def test_an_image_that_broke_since_is_named(small_config, tmp_path):
    cfg = small_config("student", "DATASETS.DIGITS.ROOT", str(tmp_path))
    register_datasets(cfg)
    for path in (tmp_path / "train_8x128" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    named = r"00000\d\.png: the image or its annotations cannot be used"
    with pytest.raises((UnusableImageError, OSError), match=named):
        next(iter(training_loader(cfg, training_set(cfg), 0)))


def test_an_unknown_sampler_is_refused(small_config):
    cfg = small_config("student", "DATALOADER.SAMPLER_TRAIN", "MySampler")
    register_datasets(cfg)
    with pytest.raises(ConfigError, match=r"SAMPLER_TRAIN: expected .*, got 'MySampler'"):
        training_loader(cfg, training_set(cfg), 0)


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (
            "DATALOADER",
            ("SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD", "-1.0"),
            "math domain error",
        ),
        ("INPUT", ("RANDOM_FLIP", "diagonal"), "horiz or vert"),
    ],
)
def test_keys_that_detectron2_cannot_use_are_told_with_their_section(
    small_config, section, keys, message
):
    named = [word if i % 2 else f"{section}.{word}" for i, word in enumerate(keys)]
    cfg = small_config("student", *named)
    register_datasets(cfg)
    with pytest.raises(ConfigError, match=rf"^{section}: cannot be built .*{message}"):
        training_loader(cfg, training_set(cfg), 0)
