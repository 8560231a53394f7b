"""Start one process or several: through detectron2's own launcher, torchrun or SLURM."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch

from detection.compat import create_local_process_group
from pcka.distributed import world_size
from pcka.engine.config import ConfigError
from pcka.engine.launch import process_group


def run(
    main: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace, *, on_gpus: bool
) -> Any:
    """Call ``main(arguments)`` in every process that the environment or the arguments request.

    Under torchrun the processes already exist and join one group, with NCCL if each has a GPU and
    with gloo on CPUs. Otherwise detectron2's launcher starts ``--num-gpus`` processes.

    Args:
        main: function that every process calls.
        arguments: parsed by ``detection.arguments.train_parser``.
        on_gpus: the processes train on GPUs, not on CPUs.

    Raises:
        ConfigError: more GPUs are requested than the machine has.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with process_group("cuda" if on_gpus else "cpu"):
            create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
            return main(arguments)
    if arguments.num_gpus > max(torch.cuda.device_count(), 1):
        raise ConfigError(
            f"--num-gpus: {arguments.num_gpus} requested, but this machine has "
            f"{torch.cuda.device_count()}; for several processes on CPUs, use torchrun"
        )
    if arguments.num_gpus * arguments.num_machines == 1:
        return main(arguments)
    return launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
