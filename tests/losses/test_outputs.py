from __future__ import annotations

import dataclasses

import pytest
import torch

from pcka.losses import Outputs


def test_a_feature_is_found_by_name():
    x = torch.zeros(2, 3)
    assert Outputs(features={"stage1": x}).feature("stage1") is x


def test_a_missing_feature_lists_what_there_is():
    outputs = Outputs(features={"stage2": torch.zeros(1), "stage1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'stage3'.*\['stage1', 'stage2'\]"):
        outputs.feature("stage3")


def test_outputs_share_nothing_and_do_not_change():
    outputs = Outputs(torch.zeros(2, 3))
    assert outputs.features is not Outputs().features
    with pytest.raises(dataclasses.FrozenInstanceError):
        outputs.logits = None
