"""A teacher that stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pcka.folding import fold_batch_norms
from pcka.observer import Observer


class FrozenTeacher(nn.Module):
    """A trained model for inference only: eval mode for ever, no gradients, no graph.

    ``model`` is taken as it is, not copied: its parameters stop requiring grad, and it goes to
    eval mode.

    Args:
        model: the trained teacher, images -> outputs.
        channels_last: keep the weights, and bring the images, in channels-last memory format.
        fold_batch_norm: put batch norms into the convolutions before them
            (:func:`pcka.folding.fold_batch_norms`): the same outputs up to rounding, faster.
        tapped: paths of modules that taps will read, which folding then leaves as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        channels_last: bool = False,
        fold_batch_norm: bool = False,
        tapped: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        if fold_batch_norm:
            fold_batch_norms(self.model, tapped)
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` asks for."""
        return super().train(False)

    # Not inference_mode: autograd refuses to save its tensors, and losses multiply by them.
    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """What the model gives for ``images (B, C, H, W)``, without a graph."""
        if self.model.training:  # whoever holds the model itself has called its train()
            self.eval()
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def observer(self, paths: Mapping[str, str], *, compile: bool = False) -> Observer:
        """The teacher with taps on its model.

        Args:
            paths: tap name -> module path in ``model``.
            compile: as in :class:`Observer`.
        """
        return Observer(self, paths, root=self.model, compile=compile)
