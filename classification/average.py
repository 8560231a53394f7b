"""The exponential moving average of a student's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedStudent:
    """A second student, whose weights follow those that are trained.

    ``average += (1 - decay) * (student - average)`` after every update, for parameters and for the
    running statistics of batch norm; counters are copied. The work is the device's alone, so that
    it can be part of a recorded step.

    Args:
        student: that is trained; where the average starts.

    Attributes:
        model: the averaged student, without gradients.
    """

    def __init__(self, student: nn.Module) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False)
        ours, theirs = (m.state_dict(keep_vars=True) for m in (self.model, student))
        # By identity: a weight that two modules share stands twice in a state.
        pairs = {id(own): (own, theirs[name]) for name, own in ours.items()}.values()
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._decay = 0.0
        self._weight = torch.ones((), device=self._averaged[0][0].device)

    def set_decay(self, decay: float) -> None:
        """Set what the next updates keep of the average."""
        if decay != self._decay:  # mostly it stays
            self._decay = decay
            self._weight.fill_(1 - decay)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by a step."""
        ours, theirs = ([pair[i] for pair in self._averaged] for i in (0, 1))
        way = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(way, self._weight)
        torch._foreach_add_(ours, way)
        for own, counter in self._copied:
            own.copy_(counter)

    def tensors(self) -> list[Tensor]:
        """All that :meth:`update` changes in place."""
        return [own for own, _ in (*self._averaged, *self._copied)]
