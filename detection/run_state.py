"""What a resumed run needs beside weights, optimizer and schedule."""

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
    """The random generators' states, and the loss normaliser that dense detectors keep.

    Each process draws its own numbers; the file holds those of the first. The others start anew
    after a resume, from its states and their rank.

    Args:
        student: RetinaNet and FCOS hold a moving mean of the positives outside ``state_dict``.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The present states, as tensors and plain values."""
        normalizer = getattr(self.student, "loss_normalizer", None)
        return {"random": capture_random_state(), "loss_normalizer": normalizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the random states for :meth:`restore_random`; set the normaliser."""
        self._random = _in_todays_form(state["random"])
        if state["loss_normalizer"] is not None:
            self.student.loss_normalizer = state["loss_normalizer"]

    def restore_random(self) -> None:
        """Set the generators, once everything that draws numbers at its start is built."""
        if self._random is None:
            return
        restore_random_state(self._random)
        if rank := comm.get_rank():
            random.seed(random.getrandbits(32) + rank)
            np.random.seed((int(np.random.randint(2**31)) + rank) % 2**32)
            torch.manual_seed(int(torch.randint(2**31, ()).item()) + rank)


@contextmanager
def lent_random_states() -> Iterator[None]:
    """Let a block draw numbers, and give the generators back as they were."""
    states = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(states)


def _in_todays_form(states: dict[str, Any]) -> dict[str, Any]:
    """Random states of an older checkpoint, which kept lists, and one GPU's state by itself."""
    version, keys, position = states["python"]
    name, own, *rest = states["numpy"]
    cuda = states.get("cuda", [])
    return {
        "python": (version, tuple(keys), position),
        "numpy": (name, torch.as_tensor(own), *rest),
        "torch": states["torch"],
        "cuda": [cuda] if isinstance(cuda, Tensor) else cuda,
    }
