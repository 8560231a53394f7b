"""Runs so small that a test may train: 40 digits of 16 pixels, resnet8, two epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classification.config import load_config

DIGITS = Path(__file__).parents[2] / "configs" / "classification" / "digits"


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever machine the test runs on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def digits_configs():
    """The folder of the configurations for digits."""
    return DIGITS


@pytest.fixture
def tiny_overrides(tmp_path):
    """KEY VALUE pairs of a run in ``tmp_path / name``; further keys by their dotted names."""

    def overrides(name: str = "run", **keys: object) -> list[str]:
        values = {
            "OUTPUT_DIR": tmp_path / name,
            "TEACHER.CACHE_DIR": tmp_path / "teachers",
            "TEACHER.NAME": "resnet8",
            "TEACHER.EPOCHS": 1,
            "DEVICE": "cpu",
            "CHANNELS_LAST": False,
            "AUTOCAST": "",
            "DATA.IMAGE_SIZE": 16,
            "DATA.HOLDOUT": 40,
            "DATA.TRAIN_IMAGES": 40,
            "SOLVER.EPOCHS": 2,
            "SOLVER.BATCH_SIZE": 10,
            **keys,
        }
        return [str(word) for pair in values.items() for word in pair]

    return overrides


@pytest.fixture
def tiny_config(tiny_overrides):
    """The configuration of such a run; ``method`` is a file of configs/classification/digits."""

    def config(method: str = "ce", name: str = "run", **keys: object):
        return load_config(DIGITS / f"{method}.yaml", tiny_overrides(name, **keys))

    return config
