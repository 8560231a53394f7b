"""The differences between detectron2's release 0.6 and its main branch, handled only here."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell detectron2 which processes share a machine; 0.6 has no public function for it."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    own_machine = dist.get_rank() // processes_per_machine
    for machine in range(dist.get_world_size() // processes_per_machine):
        first = machine * processes_per_machine
        group = dist.new_group(list(range(first, first + processes_per_machine)))
        if machine == own_machine:
            comm._LOCAL_PROCESS_GROUP = group


def open_loader(trainer: SimpleTrainer) -> None:
    """Start the trainer's loader now; main starts it at the first step, 0.6 on construction."""
    trainer._data_loader_iter  # noqa: B018  (in main a property that starts the loader when read)
