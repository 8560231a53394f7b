"""Tokens, and maps with their channels last, on their way through the distiller to every loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pcka import Distiller, FeatureTap, losses
from pcka.losses import Context
from pcka.taps import as_map

BATCH, CLASSES, SIDE = 4, 5, 32
IMAGES = torch.linspace(-2, 3, BATCH * 3 * SIDE * SIDE).sin().view(BATCH, 3, SIDE, SIDE)
STAGES = ("stage1", "stage2", "stage3")
SETTINGS = {"PCKA": {"patch_sizes": 2}, "PATCHED": {"patch_sizes": 2}, "CRD": {"negatives": 8}}


class Net(nn.Module):
    """Three stages of one width, and a classifier of their mean; ``pooled`` is what it gets."""

    suffix = ""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.patches = nn.Conv2d(3, width, patch, patch)
        for stage in STAGES:
            self.add_module(stage, self.stage(width))
        self.pooled, self.head = nn.Identity(), nn.Linear(width, CLASSES)

    def stage(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        x = self.laid_out(self.patches(images))
        for stage in STAGES:
            x = self.get_submodule(stage)(x)
        return self.head(self.pooled(self.mean(x)))

    def laid_out(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class ChannelsLast(Net):
    suffix = ":map"

    def stage(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def laid_out(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


class Tokens(ChannelsLast):
    """With a class token and two registers before the image's."""

    num_prefix_tokens = 3

    def laid_out(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x.flatten(2).mT, (0, 0, self.num_prefix_tokens, 0))

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(1)


KINDS = {"cnn": Net, "vit": Tokens, "swin": ChannelsLast}
PAIRS = [("cnn", "vit"), ("vit", "cnn"), ("vit", "swin"), ("swin", "vit"), ("swin", "cnn")]


def distilled(student: str, teacher: str, loss: losses.Loss, *, norms: bool = True) -> Distiller:
    """Prepared: widths 4 and 6, sides 8 and 16."""
    own, other = KINDS[student](4, 4), KINDS[teacher](6, 2)
    paths = {"last": "stage3", **{stage: stage for stage in STAGES}}
    paths |= {f"{name}_preact": path for name, path in paths.items()}
    taps = {name: (path + own.suffix, path + other.suffix) for name, path in paths.items()}
    distiller = Distiller(own, other, [loss], taps | {"pooled": "pooled"})
    norm = torch.linspace(0.5, 1.5, 6), torch.linspace(-0.5, 0.5, 6)
    context = Context(
        train_labels=torch.arange(20) % CLASSES,
        teacher_classifier=other.head,
        teacher_norms={f"{stage}_preact": norm for stage in STAGES if norms},
    )
    torch.manual_seed(0)
    distiller.prepare(IMAGES, context=context)
    return distiller


@pytest.mark.parametrize("name", [n for n in losses.names() if not losses.build(n).of_detectors])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_loss_takes_pairs_of_all_kinds(student, teacher, name):
    distiller = distilled(student, teacher, losses.build(name, **SETTINGS.get(name, {})))
    torch.manual_seed(1)
    terms = distiller(IMAGES, torch.arange(BATCH), indices=torch.arange(BATCH))
    assert all(term.isfinite() and term != 0 for term in terms.values())
    sum(terms.values()).backward()
    assert distiller.student.patches.weight.grad.norm() > 0
    assert all(p.grad is not None for p in distiller.adapters.parameters())


def test_ofd_of_a_teacher_without_norms_is_refused_for_that():
    with pytest.raises(ValueError, match="OFD takes the margin of 'stage1_preact' from the batch"):
        distilled("vit", "vit", losses.OFD(), norms=False)


def test_pcka_of_tokens_is_that_of_their_map():
    distiller = distilled("vit", "cnn", losses.PCKA(patch_sizes=2, weights=1.0))
    (value,) = distiller(IMAGES, None).values()
    with torch.no_grad(), FeatureTap(distiller.student, {"x": "stage3"}) as tap:
        distiller.student(IMAGES)
        image = tap.pop()["x"][:, 3:]  # (B, 64, 4)
        with FeatureTap(distiller.teacher.model, {"x": "stage3"}) as other:
            distiller.teacher.model(IMAGES)
            theirs = other.pop()["x"]
    adapter = distiller.adapters["last"]
    adapted = adapter(image.mT.reshape(BATCH, 4, 8, 8))
    pooled = nn.functional.adaptive_avg_pool2d(theirs, 8)
    torch.testing.assert_close(value, losses.pcka_loss(adapted, pooled, patch_size=2))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_become_a_map_without_what_stands_before_them(prefix):
    image = torch.randn(2, 3, 7, 7)
    tokens = torch.cat([torch.full((2, prefix, 3), 9.0), image.flatten(2).mT], 1)
    for known in (prefix, None):
        assert torch.equal(as_map(tokens, known), image)


def test_a_prefix_that_is_known_wins_over_a_larger_square():
    image = torch.randn(2, 3, 2, 2)
    tokens = torch.cat([torch.zeros(2, 5, 3), image.flatten(2).mT], 1)  # nine, another square
    assert torch.equal(as_map(tokens, 5), image)
    patches = torch.randn(2, 3, 4, 4)  # before a class token is put there
    assert torch.equal(as_map(patches.flatten(2).mT, 1), patches)


def test_channels_that_come_last_become_the_second_dimension():
    image = torch.randn(2, 3, 5, 7)
    assert torch.equal(as_map(image.permute(0, 2, 3, 1)), image)


@pytest.mark.parametrize("shape", [(2, 8), (2, 119, 3), (1, 2, 3, 4, 5)])
def test_what_is_neither_is_refused(shape):
    with pytest.raises(ValueError, match=r":map reads tokens \(B, N, C\) of a square image, or a"):
        as_map(torch.zeros(shape))


def test_the_tap_that_cannot_be_read_as_a_map_is_named():
    model = Tokens(4, 4)
    with FeatureTap(model, {"a": "pooled:map"}), pytest.raises(ValueError, match="tap 'a': module"):
        model(IMAGES)


@pytest.mark.parametrize("path", ["stage1:map", "stage1.0:map", "stage2:input:map"])
def test_the_number_of_tokens_is_that_of_the_innermost_model(path):
    inner = Tokens(4, 4)
    path = f"0.{path}"
    with FeatureTap(nn.Sequential(inner), {"a": path}) as tap:
        nn.Sequential(inner)(IMAGES)
        assert tap.pop()["a"].shape == (BATCH, 4, 8, 8)


def test_a_part_of_what_a_module_returns_is_read_as_a_map():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x.flatten(2).mT, 7

    model = Pair()
    with FeatureTap(model, {"a": ":0:map"}) as tap:
        model(IMAGES)
        assert torch.equal(tap.pop()["a"], IMAGES)


def test_tokens_without_the_suffix_are_refused_with_it_as_the_way_out():
    own, other = Tokens(4, 4), Net(6, 2)
    distiller = Distiller(
        own, other, [losses.AT(stages=["stage1"], weights=1.0)], {"stage1": "stage1"}
    )
    with pytest.raises(ValueError, match="':map' after its path reads tokens as a map"):
        distiller(IMAGES, None)
    for loss in (losses.CC(stages=["stage1"]), losses.PKD(stages=["stage1"], weights=1.0)):
        with pytest.raises(ValueError, match="':map' after its path reads tokens as a map"):
            distiller = Distiller(own, other, [loss], {"stage1": "stage1"})
            distiller.prepare(IMAGES)
            distiller(IMAGES, None)
