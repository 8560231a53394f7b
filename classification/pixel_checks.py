"""Check that images reach a model as in its training: channel order and pixel statistics."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from classification.config import IMAGENET_MEAN, IMAGENET_STD
from classification.data import ImageSet, PixelNormalize
from pcka.engine.doctor import FAIL, PASS, WARN, Verdict
from pcka.engine.pixel_trials import PixelInput, better_input, is_normal, numbers
from pcka.modes import evaluation_mode

# Usual training statistics, for pixels in [0, 1].
USUAL = {
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
    "CIFAR-10's": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "CIFAR-100's": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "those for [-1, 1]": ([0.5] * 3, [0.5] * 3),
    "those for [0, 1]": ([0.0] * 3, [1.0] * 3),
    "those for [0, 255]": ([0.0] * 3, [1 / 255] * 3),
}


def check_normalisation(role: str, section: CfgNode, images: Tensor) -> Verdict:
    """Check that a section's statistics bring images (B, 3, S, S) near mean 0 and deviation 1."""
    pixels = PixelNormalize(section.PIXEL_MEAN, section.PIXEL_STD).to(images.device)
    std, mean = torch.std_mean(pixels(images))
    text = f"normalised, they have mean {mean:.2f} and deviation {std:.2f}"
    if is_normal(mean.item(), std.item()):
        return Verdict(PASS, text)
    stds, means = torch.std_mean(images, (0, 2, 3))
    return Verdict(
        WARN,
        f"{text}, far from 0 and 1; check {role}.PIXEL_MEAN and PIXEL_STD (these images have "
        f"{numbers(means.tolist())} and {numbers(stds.tolist())})",
    )


@torch.no_grad()
def check_channels(model: nn.Module, section: CfgNode, data: ImageSet) -> Verdict:
    """Check whether a trained model does better with swapped channels or other usual statistics.

    Args:
        model: normalised images -> logits.
        section: STUDENT or TEACHER, the model's.
        data: labelled images, on the model's device.
    """
    own = PixelInput(section.PIXEL_MEAN, section.PIXEL_STD)
    found = better_input(own, USUAL, "BGR", lambda given: _right(model, given, data))
    better = found.given
    if better is None:
        text = f"{found.ours:.2f} %; no other channel order or usual statistics are better"
        return Verdict(PASS, text)
    kind, _, name = found.name.partition(": ")
    text = f"{kind}: {found.reached:.2f} % with {name}, {found.ours:.2f} % as configured; "
    if better.swapped:
        # With reversed weights, the statistics apply to channels in RGB order.
        stay = better.mean == own.mean[::-1] and better.std == own.std[::-1]
        also = "" if stay else ", reverse TEACHER.PIXEL_MEAN and PIXEL_STD"
        return Verdict(
            FAIL,
            f"{text}the model was trained on BGR: reverse the input channels of its first "
            f"layer's weights{also}, or wrap it in a model of your own (package.module:factory)",
        )
    mean, std = numbers(better.mean), numbers(better.std)
    return Verdict(FAIL, f"{text}set TEACHER.PIXEL_MEAN {mean} and TEACHER.PIXEL_STD {std}")


def _right(model: nn.Module, given: PixelInput, data: ImageSet) -> Tensor:
    """Return which images are classified correctly, (N,) bool."""
    pixels = PixelNormalize(given.mean, given.std).to(data.device)
    found = []
    with evaluation_mode(model):
        for images, labels, _ in data.evaluation_batches():
            images = images.flip(1) if given.swapped else images
            found.append(model(pixels(images)).argmax(1) == labels)
    return torch.cat(found)
