"""What trains one student: its optimizer, its figures, and the state that it goes on from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from classification.data import Batch, ImageSet, steps_per_epoch
from classification.data.batches import PROCESS_STREAM, stream_seed
from classification.distillation import pixel_statistics
from classification.environment import autocast
from classification.evaluation import accuracy, stage_alignment
from classification.loss_window import LossWindow, NonFiniteLossError
from classification.random_state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
)
from classification.run_files import CHECKPOINT, RunFiles
from classification.solver import build_optimizer, distillation_scale, learning_rate
from pcka.distiller import Distiller
from pcka.distributed import OWN_BUFFERS, average_buffers, rank, world_size
from pcka.losses import Outputs


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message names step, loss terms and last good checkpoint."""


@dataclass(frozen=True)
class StepInputs:
    """What a step trains on.

    Attributes:
        images: (B, 3, S, S), normalised for the student.
        labels: (B,) int64.
        indices: (B,) int64, positions in the training set.
        teacher: the teacher's outputs on the same samples, or None where no loss needs them.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    teacher: Outputs | None


class Trainer:
    """Trains ``distiller.student`` and writes an epoch's state and figures when it is complete.

    Args:
        cfg: the run's configuration.
        distiller: on the device that trains, its losses prepared.
        taps: stage name -> (student path, teacher path), followed by CKA; empty without a teacher.
        train_set: on that device.
        evaluation_set: on that device.
        files: of the run; None in all processes but the first, which alone writes.
    """

    def __init__(
        self,
        cfg: CfgNode,
        distiller: Distiller,
        taps: dict[str, tuple[str, str]],
        train_set: ImageSet,
        evaluation_set: ImageSet,
        files: RunFiles | None,
    ) -> None:
        self.cfg = cfg
        self.distiller = distiller
        self.taps = taps
        self.train_set = train_set
        self.evaluation_set = evaluation_set
        self.files = files
        self.student_pixels = pixel_statistics(cfg.STUDENT).to(train_set.device)
        self.teacher_pixels = pixel_statistics(cfg.TEACHER).to(train_set.device)
        self.optimizer = build_optimizer(cfg, distiller.parameters())
        self.steps_per_epoch = steps_per_epoch(train_set, cfg, world_size())
        self.epoch = 0  # epochs completed
        self.best = {"best_accuracy": -1.0, "best_epoch": 0}
        self.seconds = 0.0
        self.window = LossWindow()
        self.failure: TrainingFailedError | None = None
        self._model = _data_parallel(distiller) if world_size() > 1 else distiller
        self._random = capture_random_state()

    @property
    def waiting(self) -> bool:
        """There are epochs to train."""
        return self.failure is None and self.epoch < self.cfg.SOLVER.EPOCHS

    def batches(self) -> Iterator[Batch]:
        """This process's part of the epoch's batches."""
        return self.train_set.training_batches(self.cfg, self.epoch, rank(), world_size())

    def start_epoch(self) -> None:
        """Forget the losses of the last epoch; no two processes draw the same masks in this one."""
        self.window = LossWindow()
        if rank() > 0:  # the first one goes on with its own, as if it were alone
            with self.own_random_state():
                seed_everything(stream_seed(self.cfg.SEED, self.epoch, PROCESS_STREAM, rank()))
        self.distiller.train()

    def step(self, inputs: StepInputs, step: int) -> None:
        """Update the student by one batch; the loss terms stay on the device.

        Args:
            inputs: of this process.
            step: of the epoch, from 0.
        """
        progress = self.epoch + step / self.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, progress)
        self.distiller.distillation_scale = distillation_scale(self.cfg, progress)
        with self.own_random_state(), autocast(self.cfg, inputs.images.device):
            terms = self._model(
                inputs.images,
                inputs.labels,
                indices=inputs.indices,
                teacher_outputs=inputs.teacher,
            )
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.window.add({**terms, "loss_total": total})

    def finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate and write the epoch; :meth:`restore` mends what a kill leaves undone.

        Args:
            figures: of the epoch, beside the losses: its ``seconds`` and whatever else is to be
                written down.
        """
        start = time.perf_counter()
        means = self.window.read()
        student = self.distiller.student
        average_buffers(student)  # before the check, which then finds the same in all processes
        self._check_student(means)
        top1 = accuracy(student, self.student_pixels, self.evaluation_set)["top1"]
        self.epoch += 1
        is_best = top1 > self.best["best_accuracy"]
        if is_best:
            self.best = {"best_accuracy": top1, "best_epoch": self.epoch}
        if self.files is None:
            return
        alignment = self._alignment() if self.taps else {}
        whole = figures["seconds"] + time.perf_counter() - start
        self.seconds += whole
        best = self.best["best_accuracy"]
        record = {"epoch": self.epoch, "accuracy": top1, "best_accuracy": best}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], **means, **figures, **alignment}
        self.files.add_metrics(record)
        self.files.save_last(student)
        self.files.save_state(self.state())
        if is_best:
            self.files.save_best(student)
        self._log(record, whole)

    def fail(self, error: NonFiniteLossError) -> None:
        """Train no further, because of a loss that is not finite."""
        kept = "none yet"
        if self.epoch:
            kept = f"{Path(self.cfg.OUTPUT_DIR) / CHECKPOINT} (epoch {self.epoch})"
        self.failure = TrainingFailedError(
            f"epoch {self.epoch + 1} is {error}; last good checkpoint: {kept}. A lower "
            "SOLVER.BASE_LR, SOLVER.WARMUP_EPOCHS, DISTILL.WARMUP or a smaller loss weight "
            "may help"
        )

    def _alignment(self) -> dict[str, float]:
        student = (self.student_pixels, self.distiller.student)
        teacher = (self.teacher_pixels, self.distiller.teacher.model)
        by_stage = stage_alignment(student, teacher, self.taps, self.evaluation_set)
        return {f"cka_{stage}": value for stage, value in by_stage.items()}

    def state(self) -> dict[str, object]:
        """Return all that the next epoch depends on, loadable without running code."""
        return {
            "epoch": self.epoch,
            "best": self.best,
            "seconds": self.seconds,
            "student": self.distiller.student.state_dict(),
            "losses": self.distiller.losses.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random,
            "config": self.cfg.dump(),
            "images": [self.train_set.fingerprint, self.evaluation_set.fingerprint],
        }

    def restore(self, state: dict) -> None:
        """Go on from :meth:`state`, with any number of processes."""
        self.epoch, self.best, self.seconds = state["epoch"], state["best"], state["seconds"]
        self.distiller.student.load_state_dict(state["student"])
        self.distiller.losses.load_state_dict(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._random = state["random"]
        if self.files is not None:  # a kill may have come between the three files of an epoch
            self.files.save_last(self.distiller.student)
            if self.best["best_epoch"] == self.epoch:
                self.files.save_best(self.distiller.student)

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """Draw from this run's random state, as if no other run trained beside it."""
        outside = capture_random_state()
        restore_random_state(self._random)
        try:
            yield
            self._random = capture_random_state()
        finally:
            restore_random_state(outside)

    def _check_student(self, means: dict[str, float]) -> None:
        """Refuse to keep a student that the last step broke: no loss has seen it yet."""
        for name, value in self.distiller.state_dict().items():
            if not value.isfinite().all():
                terms = {key: v for key, v in means.items() if key.startswith("loss_")}
                raise NonFiniteLossError(f"the last step ({name}), after mean losses", terms)

    def _log(self, record: dict[str, float], seconds: float) -> None:
        terms = " ".join(f"{k} {v:.4f}" for k, v in record.items() if k.startswith("loss_"))
        self.files.logger.info(
            "epoch %d/%d  %s  accuracy %.2f %%  best %.2f %%  lr %.4g  %.1f s (%.1f s of training, "
            "%.0f img/s)",
            *(self.epoch, self.cfg.SOLVER.EPOCHS, terms, record["accuracy"]),
            *(record["best_accuracy"], record["lr"], seconds, record["seconds"]),
            record["images_per_second"],
        )


def _data_parallel(distiller: Distiller) -> DistributedDataParallel:
    """Average gradients over processes; every process keeps the buffers that it computes."""
    uses_logits = any(loss.needs_logits or not loss.needs_teacher for loss in distiller.losses)
    return DistributedDataParallel(distiller, find_unused_parameters=not uses_logits, **OWN_BUFFERS)
