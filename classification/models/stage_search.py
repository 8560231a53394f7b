"""Where a model's resolutions end: what to tap in one whose stages are not known."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcka.modes import evaluation_mode

SIDE = 224  # pixels of the images that the models are tried on; all of torchvision's take them


class _Call(NamedTuple):
    path: str
    output: Tensor
    version: int


def resolution_ends(model: nn.Module) -> tuple[str, ...]:
    """Return the path of the module that gives the last map of each resolution, in order.

    Of modules within one another the outermost counts, of one after the other the last; only what
    a tap can read: square maps of more than a pixel, of modules that run once, not overwritten.

    Args:
        model: images ``(B, 3, H, W)`` -> anything; it is run once and stays as it is.

    Returns:
        Paths, empty where the model takes no images of this kind.
    """
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(partial(_keep, calls, path))
        for path, module in model.named_modules()
        if path
    ]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(torch.zeros(1, 3, SIDE, SIDE, device=device))
    except Exception:  # a proposal is all that is lost
        return ()
    finally:
        for handle in handles:
            handle.remove()
    paths = [call.path for call in calls]
    ends: dict[int, str] = {}
    for call in calls:
        height, width = call.output.shape[2:]
        whole = call.output._version == call.version and paths.count(call.path) == 1
        # A module deeper inside may belong to the next resolution, before it halves its input.
        deeper = height in ends and call.path.count(".") > ends[height].count(".")
        if whole and height == width > 1 and not deeper:
            ends[height] = call.path
    return tuple(ends[side] for side in sorted(ends, reverse=True))


def _keep(calls: list[_Call], path: str, _: nn.Module, inputs: object, output: object) -> None:
    if isinstance(output, Tensor) and output.dim() == 4:
        calls.append(_Call(path, output, output._version))
