from __future__ import annotations

import dataclasses

import pytest
import torch

from pcka import losses
from pcka.losses import Loss, Outputs, Term


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


def test_a_term_is_its_value_times_its_weight():
    term = Term(3.0, torch.tensor(0.5))
    assert term.weighted.item() == 1.5
    assert Term(torch.tensor(2.0), torch.tensor(0.5)).weighted.item() == 1


def test_a_loss_implements_terms_not_forward():
    with pytest.raises(TypeError, match=r"Old defines forward\(\); a loss implements terms\(\)"):

        class Old(Loss):
            def forward(self, student, teacher, target):
                return {}


def test_terms_are_named_by_the_class_unless_it_says_otherwise(draw):
    class Attention(losses.AT):
        pass

    class Renamed(losses.AT):
        log_name = "attention"

    pair = (Outputs(features={"a": draw(i, 2, 3, 4, 4)}) for i in (0, 1))
    student, teacher = pair
    for loss in (Attention, Renamed):
        built = loss(stages=["a"], weights=2.0)
        terms = built.terms(student, teacher, None)
        assert list(terms) == ["loss_attention_a"]
        assert terms["loss_attention_a"].weight == 2
        weighted = terms["loss_attention_a"].weighted
        torch.testing.assert_close(built(student, teacher, None)["loss_attention_a"], weighted)
