"""The exponential moving average of a student's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedStudent:
    """A second student, whose weights track those of the trained one.

    ``average += (1 - decay) * (student - average)`` after every update, for parameters and for the
    running statistics of batch norm; counters are copied. All work is on the device, so it can
    be part of a recorded step.

    Args:
        student: the trained student; the average starts from its weights.

    Attributes:
        model: the averaged student, without gradients.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False)
        ours, theirs = (m.state_dict(keep_vars=True) for m in (self.model, student))
        # By identity: a weight shared by two modules appears twice in a state dict.
        pairs = {id(own): (own, theirs[name]) for name, own in ours.items()}.values()
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._decay = 0.0
        self._weight = torch.ones((), device=self._averaged[0][0].device)

    def set_decay(self, decay: float) -> None:
        """Set the share of the average that the next updates keep."""
        if decay != self._decay:  # avoids needless writes to the device
            self._decay = decay
            self._weight.fill_(1 - decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the student."""
        ours, theirs = ([pair[i] for pair in self._averaged] for i in (0, 1))
        way = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(way, self._weight)
        torch._foreach_add_(ours, way)
        for own, counter in self._copied:
            own.copy_(counter)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that :meth:`update` changes in place."""
        return [own for own, _ in (*self._averaged, *self._copied)]
