"""A teacher that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class FrozenTeacher(nn.Module):
    """A trained model for inference only: eval mode for ever, no gradients, no graph.

    ``model`` is taken as it is, not copied: its parameters stop requiring grad, and it goes to
    eval mode.

    Args:
        model: the trained teacher, images -> outputs.
        channels_last: keep the weights, and bring the images, in channels-last memory format.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """What the model gives for ``images (B, C, H, W)``, without a graph."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)
