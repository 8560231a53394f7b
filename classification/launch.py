"""One process or many: what torchrun started joins one process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from classification.environment import choose_device


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """Join the group that ``torchrun`` describes in the environment, for the length of the block.

    NCCL where the processes train on CUDA, gloo otherwise. One process, started without
    ``torchrun``, needs no group, and one that is in a group already stays in it.

    Args:
        device_name: the key ``DEVICE``.

    Yields:
        The device of this process.
    """
    device = choose_device(device_name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
