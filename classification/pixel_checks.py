"""Whether images reach a model as it was trained on them: channel order and pixel statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from classification.config import IMAGENET_MEAN, IMAGENET_STD
from classification.data import ImageSet, PixelNormalize
from pcka.engine.doctor import FAIL, PASS, WARN, Verdict
from pcka.modes import evaluation_mode

POINTS = 2.0  # of accuracy, by which others must be better
DEVIATIONS = 3.0  # of the difference, likewise

# Statistics that models are usually trained with, for pixels in [0, 1].
USUAL = {
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
    "CIFAR-10's": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "CIFAR-100's": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "those for [-1, 1]": ([0.5] * 3, [0.5] * 3),
    "those for [0, 1]": ([0.0] * 3, [1.0] * 3),
    "those for [0, 255]": ([0.0] * 3, [1 / 255] * 3),
}


class Input(NamedTuple):
    """What is done to pixels before a model sees them."""

    mean: list[float]
    std: list[float]
    swapped: bool = False


def check_normalisation(role: str, section: CfgNode, images: Tensor) -> Verdict:
    """Whether a section's statistics bring images (B, 3, S, S) near mean 0 and deviation 1."""
    pixels = PixelNormalize(section.PIXEL_MEAN, section.PIXEL_STD).to(images.device)
    std, mean = torch.std_mean(pixels(images))
    text = f"normalised, they have mean {mean:.2f} and deviation {std:.2f}"
    if abs(mean) < 1.5 and 0.25 < std < 4:
        return Verdict(PASS, text)
    stds, means = torch.std_mean(images, (0, 2, 3))
    return Verdict(
        WARN,
        f"{text}, far from 0 and 1; check {role}.PIXEL_MEAN and PIXEL_STD (these images have "
        f"{_numbers(means.tolist())} and {_numbers(stds.tolist())})",
    )


@torch.no_grad()
def check_channels(model: nn.Module, section: CfgNode, data: ImageSet) -> Verdict:
    """Whether a trained model is better with swapped channels, or with other usual statistics.

    Better means by two points of accuracy, and by three standard deviations of the difference on
    the same images (McNemar's).

    Args:
        model: normalised images -> logits.
        section: STUDENT or TEACHER, the model's.
        data: labelled images, on the model's device.
    """
    own = Input(section.PIXEL_MEAN, section.PIXEL_STD)
    others = {f"statistics: {name}": Input(*pair) for name, pair in USUAL.items()}
    others["channels: BGR"] = own._replace(swapped=True)
    others["channels: BGR, statistics reversed too"] = Input(own.mean[::-1], own.std[::-1], True)
    right = {name: _right(model, given, data) for name, given in (("", own), *others.items())}
    best = max(others, key=lambda name: right[name].sum().item())
    reached, ours = (100 * right[name].double().mean().item() for name in (best, ""))
    deviation = 100 * (right[best] ^ right[""]).sum().item() ** 0.5 / len(data)
    if reached - ours <= max(POINTS, DEVIATIONS * deviation):
        return Verdict(PASS, f"{ours:.2f} %; no other channel order or usual statistics are better")
    kind, _, name = best.partition(": ")
    text = f"{kind}: {reached:.2f} % with {name}, {ours:.2f} % as configured; "
    if others[best].swapped:
        # The weights reversed, the statistics meet the channels in RGB order.
        stay = others[best].mean == own.mean[::-1] and others[best].std == own.std[::-1]
        also = "" if stay else ", reverse TEACHER.PIXEL_MEAN and PIXEL_STD"
        return Verdict(
            FAIL,
            f"{text}the model was trained on BGR: reverse the input channels of its first "
            f"layer's weights{also}, or wrap it in a model of your own (package.module:factory)",
        )
    mean, std = (_numbers(values) for values in (others[best].mean, others[best].std))
    return Verdict(FAIL, f"{text}set TEACHER.PIXEL_MEAN {mean} and TEACHER.PIXEL_STD {std}")


def _right(model: nn.Module, given: Input, data: ImageSet) -> Tensor:
    """Which images are classified rightly, (N,) bool."""
    pixels = PixelNormalize(given.mean, given.std).to(data.device)
    found = []
    with evaluation_mode(model):
        for images, labels, _ in data.evaluation_batches():
            images = images.flip(1) if given.swapped else images
            found.append(model(pixels(images)).argmax(1) == labels)
    return torch.cat(found)


def _numbers(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
