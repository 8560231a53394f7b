"""What a resumed run needs beside weights, optimizer and schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import nn


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
        return {"random": random_states(), "loss_normalizer": normalizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the random states for :meth:`restore_random`; set the normaliser."""
        self._random = state["random"]
        if state["loss_normalizer"] is not None:
            self.student.loss_normalizer = state["loss_normalizer"]

    def restore_random(self) -> None:
        """Set the generators, once everything that draws numbers at its start is built."""
        if self._random is None:
            return
        set_random_states(self._random)
        if rank := comm.get_rank():
            random.seed(random.getrandbits(32) + rank)
            np.random.seed((int(np.random.randint(2**31)) + rank) % 2**32)
            torch.manual_seed(int(torch.randint(2**31, ()).item()) + rank)


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)  # what legacy asks for; the annotation leaves it open
    name, keys, *rest = numpy_state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_states` gave."""
    version, keys, position = states["python"]
    random.setstate((version, tuple(keys), position))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def lent_random_states() -> Iterator[None]:
    """Let a block draw numbers, and give the generators back as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
