"""The studies' variants are what the trainers take, on the pair that they are run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from classification.compare import read_variants
from classification.config import CONFIGS, load_config
from classification.run import check_run

PAIR = CONFIGS / "cifar100_short" / "resnet56_resnet8.yaml"
STUDIES = sorted((CONFIGS.parent / "studies").glob("*.yaml"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_variant_can_be_trained(study):
    seen = {}
    for name, variant in read_variants(study).items():
        cfg = load_config(PAIR, variant.overrides, variant.method)
        check_run(cfg)
        twin = seen.setdefault(cfg.DISTILL.dump(), name)
        assert twin == name, f"{name} is {twin} under another name"


def test_the_teacher_of_the_short_trainings_is_in_the_repository():
    weights = Path(load_config(PAIR).TEACHER.WEIGHTS)
    assert (CONFIGS.parents[1] / weights).is_file() and not weights.is_absolute()
