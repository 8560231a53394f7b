from __future__ import annotations

import pytest
from torch import nn

from classification.models import create_model, model_names
from classification.models.registry import register


def test_names_are_sorted_and_buildable():
    assert model_names() == sorted(model_names())
    assert {"resnet8", "resnet32x4", "ResNet50", "resnet56_option_a"} <= set(model_names())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet18", "ResNet18"),
        ("resnet18", "torchvision/resnet18"),
        ("resnet5", "resnet56"),
        ("torchvision/ResNet_50", "torchvision/resnet50"),
    ],
)
def test_an_unknown_name_is_answered_with_its_neighbours(name, near):
    with pytest.raises(
        ValueError, match=rf"^name: .*there is no model '{name}'; did you mean .*\b{near}"
    ):
        create_model(name, 10)


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"known: .*resnet110.*resnet8x4"):
        create_model("zzz", 10)


def test_a_model_needs_a_class():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        create_model("resnet8", 0)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'resnet8'"):
        register("resnet8")(nn.Identity)
