from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pcka.analysis import find_layers
from pcka.analysis.layers import select_layers


class Windows(nn.Module):
    """Gives a row for each part of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2 * len(x), -1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.shared = nn.ReLU()
        self.windows = Windows()
        self.drop = nn.Dropout(0.9)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.body(images)
        x = self.shared(self.shared(x))
        self.windows(x)
        x = x.mean((2, 3), keepdim=True)
        return {"logits": self.head(self.flat(self.drop(x)))}


IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FOUND = ["body.0", "body.1", "body.2", "drop", "head"]


def test_each_feature_is_found_once_in_the_order_of_the_forward_pass():
    """The drop is the first to give the mean; flattening hands it on, as body does body.2."""
    model = Net().train()
    assert find_layers(model, IMAGES) == FOUND
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert model.body[1].num_batches_tracked == 0


def test_layers_by_path_and_pattern():
    model = Net()
    assert select_layers(model, None, IMAGES) == FOUND
    assert select_layers(model, "body.*", IMAGES) == FOUND[:3]
    # A pattern also finds what hands on: a block is asked for by its own name.
    assert select_layers(model, "[bf]???", IMAGES) == ["body", "flat"]
    # What is named by its path is taken as it is, and nothing twice.
    chosen = select_layers(model, ["head:input", "b*.[01]", "body", "body.1"], IMAGES)
    assert chosen == ["head:input", "body.0", "body.1", "body"]


def test_refusals():
    with pytest.raises(ValueError, match=r"no layer of Net matches 'layer\*'; available: body.0, "):
        select_layers(Net(), ["layer*"], IMAGES)
    for wanted in (None, []):
        with pytest.raises(ValueError, match="layers: none requested, or Identity has none"):
            select_layers(nn.Identity(), wanted, IMAGES)
