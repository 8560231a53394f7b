"""What a resumed run needs besides weights, optimizer and schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor, nn

from pcka.engine.random_state import capture_random_state, restore_random_state


class RunState:
    """The states of the random generators, and the loss normaliser that dense detectors keep.

    Each process draws its own random numbers; the file holds the states of the first. After a
    resume, the others are reseeded from these states and their rank.

    Args:
        student: RetinaNet and FCOS keep a moving average of the positives outside ``state_dict``.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the current states, as tensors and plain values."""
        normalizer = getattr(self.student, "loss_normalizer", None)
        return {"random": capture_random_state(), "loss_normalizer": normalizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store the random states for :meth:`restore_random`; set the normaliser."""
        self._random = _in_todays_form(state["random"])
        if state["loss_normalizer"] is not None:
            self.student.loss_normalizer = state["loss_normalizer"]

    def restore_random(self) -> None:
        """Restore the generators, once everything that draws random numbers at setup is built."""
        if self._random is None:
            return
        restore_random_state(self._random)
        if rank := comm.get_rank():
            random.seed(random.getrandbits(32) + rank)
            np.random.seed((int(np.random.randint(2**31)) + rank) % 2**32)
            torch.manual_seed(int(torch.randint(2**31, ()).item()) + rank)


@contextmanager
def lent_random_states() -> Iterator[None]:
    """Let a block draw random numbers, and restore the generators afterwards."""
    states = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(states)


def _in_todays_form(states: dict[str, Any]) -> dict[str, Any]:
    """Convert the random states of an older checkpoint, with lists and a single GPU's state."""
    version, keys, position = states["python"]
    name, own, *rest = states["numpy"]
    cuda = states.get("cuda", [])
    return {
        "python": (version, tuple(keys), position),
        "numpy": (name, torch.as_tensor(own), *rest),
        "torch": states["torch"],
        "cuda": [cuda] if isinstance(cuda, Tensor) else cuda,
    }
