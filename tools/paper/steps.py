"""Cost of a training run, from a few steps on this device, on random images."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fvcore.common.config import CfgNode

from benchmarks.classification_step import random_images
from classification.models import create_model
from classification.run import prepare_trainers
from classification.sweep import SideBySide, Sweep
from classification.trainer import Trainer
from pcka.engine.launch import process_group
from tools.paper.table import Step

# Device -> untimed and timed steps. The first record CUDA graphs; a teacher's pass serves eight.
COUNTS = {"cpu": (1, 3), "cuda": (16, 32)}
RESIDENT = 2**28  # most bytes of random images, unless the steps need more


def classifiers_step(cfgs: Sequence[CfgNode], images: int, classes: int, gpus: int) -> Step:
    """Measure a step of students trained side by side, with a randomly initialised teacher.

    Args:
        cfgs: configurations of the students, which share data and teacher.
        images: number of training images in the whole set.
        classes: number of classes.
        gpus: number of GPUs that share a batch; this device takes one GPU's share.
    """
    lead = cfgs[0]
    wanted = lead.DATA.TRAIN_IMAGES or images - lead.DATA.HOLDOUT
    share = max(1, lead.SOLVER.BATCH_SIZE // gpus)
    with TemporaryDirectory() as folder, process_group(lead.DEVICE) as device:
        untimed, timed = COUNTS[device.type]
        least, most = (untimed + timed) * share, RESIDENT // (3 * lead.DATA.IMAGE_SIZE**2)
        sets = random_images(max(least, min(wanted, most)), classes, side=lead.DATA.IMAGE_SIZE)
        measured = [_with_random_teacher(cfg, classes, share, Path(folder)) for cfg in cfgs]
        trainers = prepare_trainers(measured, device, sets)
        size = sum(map(_size_on_disk, trainers))
        seconds = _seconds(trainers, untimed, timed)
    steps = wanted // lead.SOLVER.BATCH_SIZE * lead.SOLVER.EPOCHS
    return Step(seconds, steps, gpus, size)


def _with_random_teacher(cfg: CfgNode, classes: int, batch: int, folder: Path) -> CfgNode:
    measured = cfg.clone()
    measured.defrost()
    measured.SOLVER.BATCH_SIZE = batch
    if name := cfg.TEACHER.NAME:
        measured.TEACHER.WEIGHTS = str(folder / "teacher.pth")
        measured.TEACHER.ACCURACY = 0.0
        torch.manual_seed(0)
        torch.save(create_model(name, classes).state_dict(), measured.TEACHER.WEIGHTS)
    measured.freeze()
    return measured


def _seconds(trainers: Sequence[Trainer], untimed: int, timed: int) -> float:
    sweep = Sweep()
    for trainer in trainers:
        sweep.add(trainer)
        trainer.start_epoch()
    beside = SideBySide(tuple(trainers), sweep)
    batches = islice(beside.batches(), untimed + timed)
    start = 0.0
    for number, inputs in enumerate(beside.inputs(batches)):
        if number == untimed:
            start = moment(trainers[0].device)
        beside.step(inputs, number)
    return (moment(trainers[0].device) - start) / timed


def moment(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size_on_disk(trainer: Trainer) -> int:
    """Bytes of the checkpoint, and of the last and the best student beside it."""
    trainer.changed_tensors()  # creates the momentum, which the checkpoint holds
    return saved_size(trainer.state()) + 2 * saved_size(trainer.distiller.student.state_dict())


def saved_size(content: object) -> int:
    """The bytes of a file that ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.tell()
