"""One process or many: processes started by torchrun join one process group."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from pcka.engine.environment import choose_device


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """Join the group that ``torchrun`` describes in the environment; yield this process's device.

    The backend is NCCL if the processes train on CUDA, otherwise gloo. A single process, started
    without ``torchrun``, needs no group, and one that is already in a group stays in it. Only the
    first process logs more than warnings. ``device_name`` is the value of ``DEVICE``.
    """
    device = choose_device(device_name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if distributed.get_rank() > 0:
        logging.getLogger("pcka").setLevel(logging.WARNING)
    yield device
    # Not after an error: the other processes, elsewhere in the code, would keep this one waiting,
    # and torchrun, which ends them all, would never learn of it.
    distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
