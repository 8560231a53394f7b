"""The training loop: one student, any losses, an optional teacher."""

from __future__ import annotations

import logging
import time

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from tqdm import tqdm

from classification.data import ImageSet, PixelNormalize, training_batches
from classification.data.batches import steps_per_epoch
from classification.distillation import pixel_statistics
from classification.evaluation import accuracy, stage_alignment
from classification.loss_window import LossWindow, NonFiniteLossError
from classification.random_state import capture_random_state, restore_random_state
from classification.run_files import RunFiles
from classification.solver import build_optimizer, learning_rate
from pcka.distiller import Distiller

logger = logging.getLogger("classification")


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message names step, loss terms and last good checkpoint."""


class Trainer:
    """Trains ``distiller.student`` and writes an epoch's state and figures when it is complete.

    Args:
        cfg: the run's configuration.
        distiller: on the device that trains.
        taps: stage name -> (student path, teacher path), followed by CKA; empty without a teacher.
        train_set: on that device.
        evaluation_set: on that device.
        files: of the run.
    """

    def __init__(
        self,
        cfg: CfgNode,
        distiller: Distiller,
        taps: dict[str, tuple[str, str]],
        train_set: ImageSet,
        evaluation_set: ImageSet,
        files: RunFiles,
    ) -> None:
        self.cfg = cfg
        self.distiller = distiller
        self.taps = taps
        self.train_set = train_set
        self.evaluation_set = evaluation_set
        self.files = files
        self.device = train_set.images.device
        self.student_pixels = pixel_statistics(cfg.STUDENT).to(self.device)
        self.teacher_pixels = pixel_statistics(cfg.TEACHER).to(self.device)
        self.optimizer = build_optimizer(cfg, distiller.parameters())
        self.steps_per_epoch = steps_per_epoch(train_set, cfg)
        self.epoch = 0  # epochs completed
        self.best = {"best_accuracy": -1.0, "best_epoch": 0}
        self.seconds = 0.0

    def run(self) -> None:
        """Train what is left of the epochs."""
        per_epoch = self.steps_per_epoch * self.cfg.SOLVER.BATCH_SIZE
        progress = tqdm(
            total=self.cfg.SOLVER.EPOCHS * per_epoch,
            initial=self.epoch * per_epoch,
            unit="img",
            unit_scale=True,
            disable=None,
        )
        with progress:
            while self.epoch < self.cfg.SOLVER.EPOCHS:
                try:
                    figures = self._train_epoch(progress)
                    self._check_student(figures)
                except NonFiniteLossError as error:
                    raise TrainingFailedError(self._failure(error)) from error
                self._finish_epoch(figures)

    def _train_epoch(self, progress: tqdm) -> dict[str, float]:
        """Train one epoch; return its figures."""
        start = time.perf_counter()
        progress.set_description(f"epoch {self.epoch + 1}/{self.cfg.SOLVER.EPOCHS}")
        window = LossWindow()
        self.distiller.train()
        for step, (images, labels) in enumerate(
            training_batches(self.train_set, self.cfg, self.epoch)
        ):
            rate = learning_rate(self.cfg, self.epoch + step / self.steps_per_epoch)
            window.add(self._step(images, labels, rate))
            progress.update(len(labels))
            if (step + 1) % self.cfg.LOG_EVERY == 0:
                progress.set_postfix(loss=f"{window.read()['loss_total']:.4g}")
        means = window.read()
        seconds = time.perf_counter() - start
        trained = self.steps_per_epoch * self.cfg.SOLVER.BATCH_SIZE
        return {"lr": rate, **means, "seconds": seconds, "images_per_second": trained / seconds}

    def _step(self, images: Tensor, labels: Tensor, rate: float) -> dict[str, Tensor]:
        """Update the student by one batch; return the loss terms, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        bfloat16 = self.cfg.AUTOCAST == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            terms = self.distiller(
                self._prepare(images, self.student_pixels),
                labels,
                self._prepare(images, self.teacher_pixels) if self.distiller.teacher else None,
            )
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return {**terms, "loss_total": total}

    def _prepare(self, images: Tensor, pixels: PixelNormalize) -> Tensor:
        layout = torch.channels_last if self.cfg.CHANNELS_LAST else torch.contiguous_format
        return pixels(images).contiguous(memory_format=layout)

    def _finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate and write the epoch: first what a kill may leave too much of, the state last."""
        start = time.perf_counter()
        student = self.distiller.student
        top1 = accuracy(student, self.student_pixels, self.evaluation_set)["top1"]
        if self.taps:
            figures |= self._alignment()
        figures["seconds"] += time.perf_counter() - start
        self.epoch += 1
        self.seconds += figures["seconds"]
        is_best = top1 > self.best["best_accuracy"]
        if is_best:
            self.best = {"best_accuracy": top1, "best_epoch": self.epoch}
        best = self.best["best_accuracy"]
        record = {"epoch": self.epoch, "accuracy": top1, "best_accuracy": best, **figures}
        self.files.add_metrics(record)
        self.files.save_student(student, best=is_best)
        self.files.save_state(self.state())
        self._log(record)

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
            "random": capture_random_state(),
            "config": self.cfg.dump(),
            "images": [self.train_set.fingerprint, self.evaluation_set.fingerprint],
        }

    def restore(self, state: dict) -> None:
        """Go on from :meth:`state`."""
        self.epoch, self.best, self.seconds = state["epoch"], state["best"], state["seconds"]
        self.distiller.student.load_state_dict(state["student"])
        self.distiller.losses.load_state_dict(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])

    def _check_student(self, figures: dict[str, float]) -> None:
        """Refuse to keep a student that the last step broke: no loss has seen it yet."""
        for name, value in self.distiller.state_dict().items():
            if not value.isfinite().all():
                terms = {key: v for key, v in figures.items() if key.startswith("loss_")}
                raise NonFiniteLossError(f"the last step ({name}), after mean losses", terms)

    def _failure(self, error: NonFiniteLossError) -> str:
        kept = f"{self.files.checkpoint} (epoch {self.epoch})" if self.epoch else "none yet"
        return (
            f"epoch {self.epoch + 1} is {error}; last good checkpoint: {kept}. A lower "
            "SOLVER.BASE_LR, SOLVER.WARMUP_EPOCHS or a smaller loss weight may help"
        )

    def _log(self, record: dict[str, float]) -> None:
        terms = " ".join(f"{k} {v:.4f}" for k, v in record.items() if k.startswith("loss_"))
        logger.info(
            "epoch %d/%d  %s  accuracy %.2f %%  best %.2f %%  lr %.4g  %.1f s",
            *(self.epoch, self.cfg.SOLVER.EPOCHS, terms, record["accuracy"]),
            *(record["best_accuracy"], record["lr"], record["seconds"]),
        )
