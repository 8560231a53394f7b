"""Losses of an epoch, read from the device occasionally and checked at every read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcka.distributed import sum_over_processes, world_size


class NonFiniteLossError(RuntimeError):
    """A loss, or the model that it trains, became infinite or NaN.

    Args:
        place: where in the epoch.
        terms: loss terms at that point.
    """

    def __init__(self, place: str, terms: Mapping[str, float]) -> None:
        values = ", ".join(f"{name}={value:g}" for name, value in terms.items())
        super().__init__(f"not finite at {place}: {values}")


class LossWindow:
    """Collects loss terms on the device; only :meth:`read` waits for them, and for all processes.

    A term that is not finite in one process is not finite in the mean over all, so that no process
    continues alone.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._unread: list[Tensor] = []
        self._sum = torch.zeros(1, dtype=torch.float64)
        self._steps_read = 0

    def add(self, names: Sequence[str], terms: Tensor) -> None:
        """Keep the scalars of one step, ``(T,)`` on the device, one for each name."""
        self._names = tuple(names)
        self._unread.append(terms)

    def read(self) -> dict[str, float]:
        """Return each term's mean over all steps and processes so far.

        Raises:
            NonFiniteLossError: a term of a step since the last read is not finite; the first such
                step is named with all of its terms.
        """
        if self._unread:
            steps = torch.stack(self._unread).double()
            sum_over_processes(steps)
            steps = steps.cpu() / world_size()
            self._check(steps)
            self._sum = self._sum + steps.sum(0)
            self._steps_read += len(steps)
            self._unread.clear()
        return dict(zip(self._names, (self._sum / self._steps_read).tolist(), strict=True))

    def _check(self, steps: Tensor) -> None:
        broken = (~steps.isfinite()).any(1)
        if not broken.any():
            return
        first = int(broken.int().argmax())
        terms = zip(self._names, steps[first].tolist(), strict=True)
        raise NonFiniteLossError(f"step {self._steps_read + first + 1}", dict(terms))
