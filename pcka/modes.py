"""Run models in evaluation mode temporarily, or without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode within the block, then restore every module's mode.

    Each module gets its own mode back, even after an error: ``model.train(mode)`` would put batch
    norms that the user froze with ``.eval()`` into training mode.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let a block run a model, then restore its buffers and the random generators."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {buffer.device for buffer in chain(model.parameters(), model.buffers())}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
