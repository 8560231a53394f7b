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

from classification.data import Batch, ImageSet, PixelNormalize, steps_per_epoch
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
        images: (B, 3, S, S), float32 in [0, 1].
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
        # On the device, so that a recorded step reads what is written here: the learning rate,
        # and the factor of the distillation terms.
        self._rate = torch.zeros((), device=self.device)
        self._scale = torch.zeros((), device=self.device)
        self._scheduled = (0.0, 0.0)
        self.optimizer = build_optimizer(cfg, distiller.parameters(), self._rate)
        if cfg.DISTILL.WARMUP:
            distiller.distillation_scale = self._scale
        self.steps_per_epoch = steps_per_epoch(train_set, cfg, world_size())
        self.epoch = 0  # epochs completed
        self.best = {"best_accuracy": -1.0, "best_epoch": 0}
        self.seconds = 0.0
        self.window = LossWindow()
        self.failure: TrainingFailedError | None = None
        self._model = _data_parallel(distiller) if world_size() > 1 else distiller
        self._random = capture_random_state()
        self._draws_own = False
        self._saved = 0  # epochs completed at the last checkpoint
        self._terms: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """That trains."""
        return self.train_set.device

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
        self.set_schedule(step)
        with self.own_random_state():
            terms = self.update(inputs)
        self.keep_losses(terms)

    def set_schedule(self, step: int) -> None:
        """Set what the step of the epoch trains with: the rate, and the warm-up's scale."""
        progress = self.epoch + step / self.steps_per_epoch
        values = learning_rate(self.cfg, progress), distillation_scale(self.cfg, progress)
        if values != self._scheduled:  # mostly they stay
            self._rate.fill_(values[0])
            self._scale.fill_(values[1])
            self._scheduled = values

    def update(self, inputs: StepInputs) -> Tensor:
        """One step of the optimizer, by work on the device alone: it can be recorded and replayed.

        Returns:
            The loss terms and, last, their sum, ``(T + 1,)`` float32; for :meth:`keep_losses`.
        """
        images = self._normalized(self.student_pixels, inputs.images)
        with autocast(self.cfg, images.device):
            terms = self._model(
                images, inputs.labels, indices=inputs.indices, teacher_outputs=inputs.teacher
            )
        values = torch.stack(list(terms.values()))
        total = values.sum()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self._terms = (*terms, "loss_total")
        return torch.cat([values.detach(), total.detach()[None]]).float()

    def keep_losses(self, terms: Tensor) -> None:
        """Keep what :meth:`update` returned for the epoch's means."""
        self.window.add(self._terms, terms)

    def changed_tensors(self) -> list[Tensor]:
        """All that :meth:`update` changes in place: the model, the losses, the momentum."""
        momenta = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                # What a first step starts from; made here, so that it is there to be put back.
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momenta.append(state["momentum_buffer"])
        return [*self.distiller.parameters(), *self.distiller.buffers(), *momenta]

    def for_teacher(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1], normalised for the teacher."""
        return self._normalized(self.teacher_pixels, images)

    def _normalized(self, pixels: PixelNormalize, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.cfg.CHANNELS_LAST else torch.contiguous_format
        return pixels(images).contiguous(memory_format=layout)

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
        self.epoch += 1
        record: dict[str, float] = {"epoch": self.epoch}
        is_best = False
        if self._due(self.cfg.EVAL_EVERY):
            top1 = accuracy(student, self.student_pixels, self.evaluation_set)["top1"]
            is_best = top1 > self.best["best_accuracy"]
            if is_best:
                self.best = {"best_accuracy": top1, "best_epoch": self.epoch}
            record |= {"accuracy": top1, "best_accuracy": self.best["best_accuracy"]}
            if self.files is not None and self.taps:
                record |= self._alignment()
        if self.files is None:
            return
        whole = figures["seconds"] + time.perf_counter() - start
        self.seconds += whole
        record |= {"lr": self._scheduled[0], **means, **figures}
        self.files.add_metrics(record)
        # After the first epoch, too, and with the best one: what is there can be gone on from.
        if self._due(self.cfg.SAVE_EVERY) or self.epoch == 1 or is_best:
            self.files.save_last(student)
            self.files.save_state(self.state())
            self._saved = self.epoch
        if is_best:
            self.files.save_best(student)
        self._log(self.files, record, whole)

    def _due(self, every: int) -> bool:
        """Whether what is done every so many epochs, and after the last one, is to be done."""
        return self.epoch % every == 0 or self.epoch == self.cfg.SOLVER.EPOCHS

    def fail(self, error: NonFiniteLossError) -> None:
        """Train no further, because of a loss that is not finite."""
        kept = "none yet"
        if self._saved:
            kept = f"{Path(self.cfg.OUTPUT_DIR) / CHECKPOINT} (epoch {self._saved})"
        self.failure = TrainingFailedError(
            f"epoch {self.epoch + 1} is {error}; last good checkpoint: {kept}. A lower "
            "SOLVER.BASE_LR, SOLVER.WARMUP_EPOCHS, DISTILL.WARMUP or a smaller loss weight "
            "may help"
        )

    def _alignment(self) -> dict[str, float]:
        student = (self.student_pixels, self.distiller.student)
        assert self.distiller.teacher is not None  # without one there are no taps
        teacher = (self.teacher_pixels, self.distiller.teacher.model)
        by_stage = stage_alignment(student, teacher, self.taps, self.evaluation_set)
        return {f"cka_{stage}": value for stage, value in by_stage.items()}

    def state(self) -> dict[str, object]:
        """Return all that the next epoch depends on, loadable without running code."""
        if self._draws_own:
            self._random = capture_random_state()
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
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        self._random = state["random"]
        self._saved = self.epoch
        if self.files is not None:  # a kill may have come between the three files of an epoch
            self.files.save_last(self.distiller.student)
            if self.best["best_epoch"] == self.epoch:
                self.files.save_best(self.distiller.student)

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """Draw from this run's random state, as if no other run trained beside it.

        Within itself it does nothing: a run that is alone takes it once, for its whole training.
        """
        if self._draws_own:
            yield
            return
        outside, self._draws_own = capture_random_state(), True
        restore_random_state(self._random)
        try:
            yield
            self._random = capture_random_state()
        finally:
            self._draws_own = False
            restore_random_state(outside)

    def _check_student(self, means: dict[str, float]) -> None:
        """Refuse to keep a student that the last step broke: no loss has seen it yet."""
        state = self.distiller.state_dict()
        finite = torch.stack([v.isfinite().all().to(self.device) for v in state.values()])
        for name, is_finite in zip(state, finite.tolist(), strict=True):
            if not is_finite:
                terms = {key: v for key, v in means.items() if key.startswith("loss_")}
                raise NonFiniteLossError(f"the last step ({name}), after mean losses", terms)

    def _log(self, files: RunFiles, record: dict[str, float], seconds: float) -> None:
        parts = [f"{name} {v:.4f}" for name, v in record.items() if name.startswith("loss_")]
        if "accuracy" in record:
            parts += ["", f"accuracy {record['accuracy']:.2f} %"]
            parts += ["", f"best {record['best_accuracy']:.2f} %"]
        files.logger.info(
            "epoch %d/%d  %s  lr %.4g  %.1f s (%.1f s of training, %.0f img/s)",
            *(self.epoch, self.cfg.SOLVER.EPOCHS, " ".join(parts), record["lr"], seconds),
            *(record["seconds"], record["images_per_second"]),
        )


def _data_parallel(distiller: Distiller) -> DistributedDataParallel:
    """Average gradients over processes; every process keeps the buffers that it computes."""
    uses_logits = any(loss.needs_logits or not loss.needs_teacher for loss in distiller.losses)
    return DistributedDataParallel(distiller, find_unused_parameters=not uses_logits, **OWN_BUFFERS)
