"""Every classification model of torchvision, and timm's most used families, as student and teacher.

Each teaches a resnet18 and learns from one, two steps, by logits, attention, and feature CKA.
`make test` tries one of each family; `make test-models` all of them (a quarter of an hour).
"""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

from classification.models import create_model, model_names
from classification.models.stage_search import find_stages
from classification.models.taps import Taps, loss_context, model_taps
from pcka import Distiller, losses
from pcka.engine.distill import numbered_stages

CLASSES, BATCH = 5, 3
TORCHVISION = [name for name in model_names() if name.startswith("torchvision/")]
# One of each family, cheap ones; the others are tried by `make test-models`.
TRIED = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"),
    *("mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "squeezenet1_1", "swin_v2_t"),
    *("convnextv2_atto", "deit_tiny_distilled_patch16_224", "edgenext_xx_small", "levit_128s"),
    *("mobilenetv4_conv_small", "regnety_002", "res2net50_14w_8s", "resnet18d", "vgg11_bn"),
)
SIDES = {"maxvit": 224, "inception": 299}  # of images, where 64 pixels do not do
TIMM = {
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 192, "num_heads": 3},
    "cait_xxs24_224": {"depth": 4},
    "convmixer_768_32": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "davit_tiny": {},
    "deit3_small_patch16_224": {"depth": 4},
    "deit_tiny_distilled_patch16_224": {"depth": 4},
    "densenet121": {},
    "dla34": {},
    "edgenext_xx_small": {},
    "efficientnet_b0": {},
    "eva02_tiny_patch14_224": {"depth": 4},
    "ghostnet_050": {},
    "hrnet_w18_small": {},
    "inception_v3": {},
    "levit_128s": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 224},
    "mixer_s32_224": {},
    "mobilenetv3_small_100": {},
    "mobilenetv4_conv_small": {},
    "mobilevit_xxs": {},
    "nfnet_l0": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnety_002": {},
    "repvgg_a0": {},
    "res2net50_14w_8s": {},
    "resnet18d": {},
    "swin_tiny_patch4_window7_224": {},
    "twins_pcpvt_small": {},
    "vit_tiny_patch16_224": {"depth": 4},
    "xcit_nano_12_p16_224": {},
}
ANY_SIZE = (
    *(
        "convmixer",
        "convnext",
        "dense",
        "dla",
        "efficientnet",
        "ghost",
        "mobilenet",
        "nfnet",
        "regnet",
    ),
    *("repvgg", "res"),
)


def tried_or_all(names: Collection[str]) -> list[ParameterSet]:
    """Parameters of a test: all names, those not in TRIED for `make test-models` alone."""
    marks = [[] if name.rpartition("/")[2] in TRIED else pytest.mark.exhaustive for name in names]
    return [pytest.param(name, marks=mark) for name, mark in zip(names, marks)]


def chosen_losses(taps: Taps) -> list[losses.Loss]:
    """Those of the methods kd, at, fcka and rcka_short."""
    stages = [stage for stage in numbered_stages(taps) if stage != "stage0"]
    assert len(stages) >= 2
    feature = losses.FCKA(stages=stages, weights=1.0)
    feature.log_name = "every_fcka"  # RCKA has one of the last stage
    return [losses.KD(), losses.AT(stages=stages, weights=1000.0), feature, losses.RCKA()]


@torch.no_grad()
def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Let a model that was never trained tell images from one another.

    Batch norms get the images' statistics, and what starts at zero (ViT's classifier) weights.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(images)


def two_steps(student: nn.Module, teacher: nn.Module, side: int) -> None:
    """Train; every term is there, and every loss gives the student a gradient."""
    torch.manual_seed(0)
    images, target = torch.randn(BATCH, 3, side, side), torch.arange(BATCH)
    for model in (student, teacher):
        settle(model, images)
    models = [find_stages(model, side) for model in (student, teacher)]
    taps = model_taps(*models, [])
    distiller = Distiller(student, teacher, chosen_losses(taps), taps).train()
    distiller.prepare(images)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for _ in range(2):
        terms = distiller(images, target)
        assert all(term.isfinite() for term in terms.values())
        for loss in ("kd", "at_stage", "every_fcka_stage", "fcka_last", "lcka_intra", "lcka_inter"):
            of_loss = sum(value for name, value in terms.items() if f"loss_{loss}" in name)
            gradients = torch.autograd.grad(
                of_loss, parameters, retain_graph=True, allow_unused=True
            )
            assert sum(g.norm() for g in gradients if g is not None) > 0, loss
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()


def both_ways(name: str, side: int, **kwargs: object) -> None:
    torch.manual_seed(0)
    own = create_model("torchvision/resnet18", CLASSES)
    two_steps(own, create_model(name, CLASSES, **kwargs), side)
    own = create_model("torchvision/resnet18", CLASSES)
    two_steps(create_model(name, CLASSES, **kwargs), own, side)


def smallest(name: str) -> tuple[int, dict[str, object]]:
    """The side of the images that a model of torchvision is tried on, and its keywords for that."""
    base = name.partition("/")[2]
    if base.startswith("vit_"):  # four patches a side
        return (side := 4 * int(base[-2:])), {"image_size": side}
    return next((side for start, side in SIDES.items() if base.startswith(start)), 64), {}


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_a_model_teaches_and_learns(name):
    both_ways(f"torchvision/{name}", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", tried_or_all(TORCHVISION))
def test_every_model_of_torchvision_teaches_and_learns(name):
    side, kwargs = smallest(name)
    both_ways(name, side, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", tried_or_all(TIMM))
def test_models_of_timm_teach_and_learn(name):
    both_ways(f"timm/{name}", 64 if name.startswith(ANY_SIZE) else 224, **TIMM[name])


# Of each kind of transformer, small, with what a convolutional network of torchvision takes too.
KINDS = {
    "vit": ("timm/vit_tiny_patch16_224", {"img_size": 128, "patch_size": 16, "depth": 4}),
    "swin": ("timm/swin_tiny_patch4_window7_224", {"img_size": 128, "window_size": 4}),
    "cnn": ("torchvision/resnet18", {}),
}


OF_CLASSIFIERS = [name for name in losses.names() if not losses.build(name).of_detectors]


@pytest.mark.slow
@pytest.mark.parametrize("loss", OF_CLASSIFIERS)
@pytest.mark.parametrize(("student", "teacher"), [("vit", "cnn"), ("cnn", "vit"), ("swin", "vit")])
def test_transformers_and_a_cnn_go_through_every_method(student, teacher, loss):
    torch.manual_seed(0)
    (name, kwargs), (other, others) = KINDS[student], KINDS[teacher]
    own, theirs = create_model(name, CLASSES, **kwargs), create_model(other, CLASSES, **others)
    images, target = torch.randn(BATCH, 3, 128, 128), torch.arange(BATCH)
    taps = model_taps(*(find_stages(model, 128) for model in (own, theirs)), [])
    settings = {"PCKA": {"patch_sizes": 2}, "PATCHED": {"patch_sizes": 2}, "CRD": {"negatives": 8}}
    distiller = Distiller(own, theirs, [losses.build(loss, **settings.get(loss, {}))], taps)
    norms = {
        path: (norm.weight, norm.bias)
        for path, norm in theirs.named_modules()
        if path and path in theirs.preactivation_norms
    }
    context = loss_context(theirs, norms, taps, torch.arange(20) % CLASSES)
    if loss == "OFD" and teacher != "cnn":
        with pytest.raises(ValueError, match=r"OFD takes the margin of .* from the batch norm"):
            distiller.prepare(images, context=context)
        return
    distiller.prepare(images, context=context)
    terms = distiller.train()(images, target, indices=torch.arange(BATCH))
    assert all(term.isfinite() and term != 0 for term in terms.values())
    sum(terms.values()).backward()
    assert sum(p.grad.norm() for p in own.parameters() if p.grad is not None) > 0
