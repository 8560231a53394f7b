"""The pixel statistics of a model: measured on images, stated with its weights, or inferred."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.config import IMAGENET_MEAN, IMAGENET_STD
from classification.data import PixelNormalize
from classification.models import has_own_weights, named_model, without_weights
from classification.models.torchvision_zoo import PREFIX, published
from pcka.engine.config import ConfigError, read_leaves
from pcka.modes import evaluation_mode

AT_ONCE = 32  # images per forward pass
LEAST_STD = 0.01  # uniform images have a deviation of 0


class Statistics(NamedTuple):
    """Pixel statistics of red, green and blue in [0, 1], and their source."""

    mean: Sequence[float]
    std: Sequence[float]
    source: str


USUAL = (
    Statistics(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's"),
    Statistics([0.5] * 3, [0.5] * 3, "0.5 and 0.5"),
    Statistics([0.0] * 3, [1.0] * 3, "0 and 1"),
)


def measured_statistics(pixels: Tensor) -> Statistics:
    """Return the statistics of images, (N, 3, S, S) uint8."""
    values = (pixels.double() / 255).transpose(0, 1).flatten(1)
    mean = [round(value, 4) for value in values.mean(1).tolist()]
    std = [max(round(value, 4), LEAST_STD) for value in values.std(1).tolist()]
    return Statistics(mean, std, f"measured on {len(pixels)} training images")


def stated_statistics(section: Mapping[str, Any]) -> Statistics | None:
    """Return the statistics stated with a model's weights, or None if there are none.

    They are stated by the configuration of the run that trained the weights, by timm's of the
    model, by torchvision's of its weights, or by transformers' of the folder.

    Args:
        section: STUDENT or TEACHER.
    """
    name, learned = section["NAME"], learned_with(section)
    if learned:
        mean, std = (_numbers(learned[f"STUDENT.PIXEL_{what}"]) for what in ("MEAN", "STD"))
        return Statistics(mean, std, "those of the run that trained it")
    if name.startswith("timm/"):
        model: Any = named_model(name, 2, role="teacher", **without_weights(section))
        stated = model.pretrained_cfg
        return Statistics(list(stated["mean"]), list(stated["std"]), "the model's in timm")
    if name.startswith(PREFIX) and has_own_weights(section):
        stated = published(name.removeprefix(PREFIX)).transforms()
        return Statistics(list(stated.mean), list(stated.std), "those of its weights")
    preprocessor = Path(name.removeprefix("hf/")).expanduser() / "preprocessor_config.json"
    if name.startswith("hf/") and preprocessor.is_file():
        stated = json.loads(preprocessor.read_text())
        if stated.get("do_normalize", True) and {"image_mean", "image_std"} <= stated.keys():
            return Statistics(stated["image_mean"], stated["image_std"], f"from {preprocessor}")
    return None


def _numbers(value: Any) -> list[float]:
    return [float(number) for number in value]


def learned_with(section: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings of the run that wrote a model's weights, by dotted keys, or {}."""
    path = Path(section["WEIGHTS"]).parent / "config.yaml"
    if not section["WEIGHTS"] or not path.is_file():
        return {}
    try:
        settings = read_leaves(path)
    except ConfigError:  # an unrelated file
        return {}
    return settings if settings.get("STUDENT.NAME") == section["NAME"] else {}


@torch.no_grad()
def likeliest_statistics(
    model: nn.Module, pixels: Tensor, labels: Tensor, candidates: Sequence[Statistics]
) -> Statistics:
    """Return which of the usual and further statistics suit a trained model best.

    Args:
        model: normalised images -> logits.
        pixels: (N, 3, S, S), uint8, on the model's device.
        labels: (N,) int64, likewise.
        candidates: further statistics to try, such as those measured on the images.
    """
    found = []
    distinct = {(*one.mean, *one.std): one for one in (*USUAL, *candidates)}
    for one in distinct.values():
        normalize = PixelNormalize(one.mean, one.std).to(pixels.device)
        with evaluation_mode(model):
            parts = [model(normalize(part / 255)) for part in pixels.split(AT_ONCE)]
        logits = torch.cat(parts)
        right = 100 * float((logits.argmax(1) == labels).double().mean())
        told = f"{one.source}, with {right:.0f} % of {len(labels)} training images correct"
        found.append((float(F.cross_entropy(logits.float(), labels)), one._replace(source=told)))
    return min(found, key=lambda loss_and_statistics: loss_and_statistics[0])[1]
