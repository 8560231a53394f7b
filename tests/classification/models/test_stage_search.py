from __future__ import annotations

import pytest
import torch
from torch import nn

from classification.models import create_model
from classification.models.stage_search import check_size, find_stages
from classification.models.taps import read_taps

SIDE = 64


def found(model: nn.Module, side: int = SIDE) -> tuple[str, ...]:
    return find_stages(model, side).stage_names


def shapes(model: nn.Module, side: int = SIDE) -> list[str]:
    paths = {path: path for path in model.stage_names}
    return [reading.shape for reading in read_taps(model, paths, side).values()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shufflenet_v2_x0_5", ("conv1", "maxpool", "stage2", "stage3", "conv5")),
        (
            "mobilenet_v3_small",
            ("features.0", "features.1", "features.3", "features.8", "features"),
        ),
        ("squeezenet1_1", ("features.1", "features.4", "features.7", "features")),
        (
            "swin_t",
            (
                "features.0:map", "features.1:map", "features.3:map", "features.5:map",
                "features:map",
            ),
        ),
    ],
)  # fmt: skip
def test_each_resolution_ends_at_its_outermost_last_module(name, expected):
    model = create_model(f"torchvision/{name}", 2)
    assert found(model) == expected
    sides = [int(shape.split()[-1]) for shape in shapes(model)]
    assert sides == sorted(sides, reverse=True)
    assert model.preactivation_names == expected


def test_a_model_that_names_its_stages_keeps_them():
    model = create_model("torchvision/resnet18", 2)
    named = model.stage_names, model.preactivation_names, model.pooled_name
    assert find_stages(model).stage_names == ("relu", "layer1", "layer2", "layer3", "layer4")
    assert (model.stage_names, model.preactivation_names, model.pooled_name) == named


class Block(nn.Module):
    """Residual, of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Transformer(nn.Module):
    """Tokens of patches of 8 pixels, with a class token, whose output is classified."""

    def __init__(self, depth: int = 8, width: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5, inplace=True)
        self.head = nn.Linear(width, 2)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x)[:, 0]))


def test_blocks_of_one_resolution_are_quarters_of_the_depth_as_maps():
    model = create_own(Transformer())
    blocks = ("blocks.1:map", "blocks.3:map", "blocks.5:map", "blocks.7:map")
    assert found(model) == ("patches", *blocks)
    assert shapes(model) == ["6 x 8 x 8"] * 5
    assert (model.classifier_name, model.pooled_name) == ("head", "drop:input")
    assert not model.drop.inplace
    shallow = create_own(Transformer(depth=2))
    assert found(shallow) == ("patches", "blocks.0:map", "blocks.1:map")


class EndsInADownsampling(nn.Module):
    """Blocks of a stage and the change to the next resolution behind them, in one module."""

    def __init__(self, width: int, downsamples: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.merge = nn.Conv2d(width, width, 2, 2) if downsamples else nn.Identity()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_a_stage_that_ends_in_a_downsampling_ends_with_its_last_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 4, 4)
            self.stages = nn.ModuleList(EndsInADownsampling(6, i < 2) for i in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1)
            for stage in self.stages:
                x = stage(x)
            return self.head(x.mean((1, 2)))

    model = create_own(Net())
    ends = ("stages.0.blocks.1:map", "stages.1.blocks.1:map", "stages.2:map")
    assert found(model) == ("stem", *ends)
    assert shapes(model) == ["6 x 16 x 16", "6 x 16 x 16", "6 x 8 x 8", "6 x 4 x 4"]


def test_what_only_lays_out_or_pools_is_no_stage_and_an_embedding_is_a_stem():
    class Net(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.patches = nn.Unfold(2, stride=2)  # (B, 12, N), channels first
            self.embedding = embedding
            self.blocks = nn.Sequential(Block(16), Block(16))
            self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(16, 2)

        def forward(self, images):
            tokens = self.blocks(self.embedding(self.patches(images).mT))
            return self.head(self.pool(tokens.mT).flatten(1))

    model = create_own(Net(nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16))))
    assert found(model) == ("embedding:map", "blocks.0:map", "blocks.1:map")
    assert found(create_own(Net(nn.Linear(12, 16)))) == ("blocks.0:map", "blocks.1:map")
    assert model.pooled_name == "head:input"


def test_what_is_overwritten_shared_or_not_there_in_one_mode_is_passed_over():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x):
            return (x, self.head(x)) if self.training else x

    shared = nn.ReLU()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 4, 3, 2, 1), shared, nn.Conv2d(4, 4, 3, 1, 1), shared,
                nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True),
            )  # fmt: skip
            self.auxiliary = Auxiliary()

        def forward(self, x):
            x = self.body(x)
            self.auxiliary(x)
            return x.mean((2, 3))

    assert found(create_own(Net())) == ("body.2", "body")


def test_the_model_stays_as_it_is_but_for_the_names():
    model = create_own(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    ).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert found(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_of_one_size_is_tried_on_its_own():
    model = create_own(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 2))
    )
    assert found(model, 32) == ("0",)
    check_size(model, 32)
    with pytest.raises(ValueError, match="Sequential does not take images of 64 pixels: mat1"):
        check_size(model, 64)


def test_a_model_that_takes_no_images_has_none():
    assert found(create_own(nn.Linear(3, 4))) == ()


def create_own(model: nn.Module) -> nn.Module:
    """With the attributes of a classifier, of which nothing is known yet."""
    model.stage_names = model.preactivation_names = model.preactivation_norms = ()
    model.pooled_name = model.classifier_name = ""
    return model
