"""Training one student: its loop, steps and metrics, and the state that it resumes from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classification.average import AveragedStudent
from classification.data import Batch, ImageSet, pixel_statistics, steps_per_epoch
from classification.data.augmentation import augmented_batches
from classification.data.batches import PROCESS_STREAM, stream_seed
from classification.dot import DistillationOriented
from classification.evaluation import accuracy, gradient_figures, stage_alignment
from classification.lessons import Lessons, StepInputs
from classification.solver import (
    average_decay,
    build_optimizer,
    distillation_scale,
    learning_rate,
    optimizer_tensors,
    read_rate_from,
)
from pcka.distiller import Distiller
from pcka.distributed import average_buffers, rank, world_size
from pcka.engine.command import TrainingFailedError
from pcka.engine.cuda_graph import Recorded
from pcka.engine.environment import autocast
from pcka.engine.loss_window import LossWindow, NonFiniteLossError
from pcka.engine.progress import Pace
from pcka.engine.random_state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
)
from pcka.engine.run_folder import CHECKPOINT, RunFolder, read_metrics

if TYPE_CHECKING:
    from classification.teacher_outputs import KeptOutputs


@dataclass(eq=False)
class Trainer:
    """Trains ``distiller.student`` and writes state and metrics after every epoch.

    On a CUDA device, the step is recorded as a graph and replayed where possible: it then costs
    only the device's work, not the time that Python takes to launch it.

    Args:
        cfg: the run's configuration.
        distiller: on the training device, with its losses prepared.
        taps: stage name -> (student path, teacher path), tracked by CKA; empty without a teacher.
        train_set: on that device.
        evaluation_set: on that device.
        files: of the run; None in all processes except the first, which is the only one to write.
        kept: the teacher's outputs on disk; None if they are not kept.

    Attributes:
        epoch: number of epochs completed.
        best: accuracy (percent) and number of the best epoch so far.
        seconds: of all epochs, including evaluation.
        average: of the student's weights; None if not requested.
        measures_gradients: whether the next step measures the gradient of each term.
        kind: whether the next step begins a group of batches that share an update, and whether it
            ends one.
    """

    cfg: CfgNode
    distiller: Distiller
    taps: dict[str, tuple[str, str]]
    train_set: ImageSet
    evaluation_set: ImageSet
    files: RunFolder | None
    kept: KeptOutputs | None = None

    def __post_init__(self) -> None:
        cfg, distiller = self.cfg, self.distiller
        self.device = self.train_set.device
        self.steps_per_epoch = steps_per_epoch(self.train_set, cfg, world_size())
        self.epoch = 0
        self.best = {"best_accuracy": -1.0, "best_epoch": 0}
        self.seconds = 0.0
        self.window = LossWindow()
        self.measures_gradients = False
        self.kind = (True, True)
        self._gradients: dict[str, float] = {}
        self._pixels = pixel_statistics(cfg.STUDENT).to(self.device)
        # On the device, so that a recorded step reads their current values: the learning rate,
        # and the factor of the distillation terms.
        self._rate = torch.zeros((), device=self.device)
        self._scale = torch.zeros((), device=self.device)
        self._scheduled = (0.0, 0.0)
        if cfg.DISTILL.WARMUP:
            distiller.distillation_scale = self._scale
        self.optimizer = build_optimizer(cfg, distiller)
        read_rate_from(self._rate, self.optimizer)
        self.average = AveragedStudent(distiller.student) if cfg.SOLVER.EMA_DECAY else None
        self._model: nn.Module = distiller
        if world_size() > 1 and not isinstance(self.optimizer, DistillationOriented):
            from classification.data_parallel import data_parallel  # most runs have one process

            self._model = data_parallel(cfg, distiller, self.train_set)
        self.obstacle = _obstacle(self)
        self._update = Recorded(
            self.update, self.changed_tensors, kind=lambda: self.kind, obstacle=self.obstacle
        )
        self._saved_epoch = 0
        self._told_of_chance = False
        self._terms: tuple[str, ...] = ()

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            TrainingFailedError: a loss, or the student, is not finite.
        """
        while self.epoch < self.cfg.SOLVER.EPOCHS:
            self.train_epoch()

    def train_epoch(self) -> None:
        """Train one epoch, evaluate, and write the results."""
        self.start_epoch()
        with self.pace() as pace:
            for step, inputs in enumerate(self.inputs(pace.watch(self.batches()))):
                self.step(inputs, step)
                pace.count_step()
                if self.reads_after(step):
                    pace.show(loss=self.read_losses()["loss_total"])
        self.finish_epoch(pace.figures())

    def step(self, inputs: StepInputs, step: int) -> None:
        """Train on this process's part of the epoch's ``step``-th batch, counted from 0."""
        self.set_schedule(step)
        update = self.update if self.measures_gradients else self._update
        self.keep_losses(update(inputs).clone())

    def update(self, inputs: StepInputs) -> Tensor:
        """Compute a batch's gradient and, if it ends its group, step the optimizer.

        All work is on the device, so it can be recorded and replayed.

        Returns:
            The loss terms, their sum and, if gradients are clipped, their norm, ``(T,)`` float32,
            for :meth:`keep_losses`.
        """
        begins, ends = self.kind
        if begins:  # accumulated gradients keep their memory, for recorded steps
            self.optimizer.zero_grad(set_to_none=ends)
        with nullcontext() if ends else self._apart():
            values = self._backward(inputs)
        if self.cfg.SOLVER.CLIP_GRADIENTS:
            values = torch.cat([values, self._clipped_norm(values)])
        if ends:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        return values

    def _apart(self) -> AbstractContextManager:
        """Do not synchronise gradients with other processes yet."""
        model = self._model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _backward(self, inputs: StepInputs) -> Tensor:
        """Add a batch's part of the gradient; return its loss terms and their sum."""
        layout = torch.channels_last if self.cfg.CHANNELS_LAST else torch.contiguous_format
        images = self._pixels(inputs.images).contiguous(memory_format=layout)
        with autocast(self.cfg.AUTOCAST, self.device):
            terms = self._model(
                images, inputs.labels, indices=inputs.indices, teacher_outputs=inputs.teacher
            )
        if self.measures_gradients:
            self._gradients = gradient_figures(terms, self.distiller.student)
        values = torch.stack(list(terms.values()))
        total = values.sum()
        group = self.cfg.SOLVER.ACCUMULATE
        if isinstance(self.optimizer, DistillationOriented):
            taught = self.distiller.taught_terms
            self.optimizer.backward(
                task=[value for name, value in terms.items() if name not in taught],
                taught=[value for name, value in terms.items() if name in taught],
            )
        else:
            (total if group == 1 else total / group).backward()
        self._terms = (*terms, "loss_total")
        return torch.cat([values.detach(), total.detach()[None]]).float()

    def _clipped_norm(self, values: Tensor) -> Tensor:
        """Clip the gradients once they are complete; return their norm before clipping.

        So that means over batches are right, the last batch of a group returns the norm times the
        group's size, the others 0.
        """
        self._terms += ("gradient_norm",)
        if not self.kind[1]:
            return values.new_zeros(1)
        most = self.cfg.SOLVER.CLIP_GRADIENTS
        norm = nn.utils.clip_grad_norm_(self.distiller.parameters(), most)
        return self.cfg.SOLVER.ACCUMULATE * norm.float()[None]

    def set_schedule(self, step: int) -> None:
        """Set the schedules for a step of the epoch, and whether it measures gradients."""
        cfg, group, steps = self.cfg, self.cfg.SOLVER.ACCUMULATE, self.steps_per_epoch
        first = step - step % group  # batch of the update
        self.kind = (step == first, step + 1 == first + group)
        progress = self.epoch + first / steps
        values = learning_rate(cfg, progress, group / steps), distillation_scale(cfg, progress)
        if values != self._scheduled:  # avoids needless writes to the device
            self._rate.fill_(values[0])
            self._scale.fill_(values[1])
            self._scheduled = values
        if self.average is not None:
            updates = (self.epoch * steps + first) // group
            self.average.set_decay(average_decay(cfg, updates))
        every, epoch = self.cfg.GRADIENTS_EVERY, self.epoch + 1
        due = every and (epoch % every == 0 or epoch == self.cfg.SOLVER.EPOCHS)
        self.measures_gradients = bool(due and step + 1 == self.steps_per_epoch)

    def keep_losses(self, terms: Tensor) -> None:
        """Keep what :meth:`update` returned for the epoch's means."""
        self.window.add(self._terms, terms)

    def read_losses(self) -> dict[str, float]:
        """Return the means of the epoch so far; waits for the device and for all processes.

        Raises:
            TrainingFailedError: a loss is not finite.
        """
        with self._telling_failures():
            return self.window.read()

    def reads_after(self, step: int) -> bool:
        """Whether the losses are read after a step of the epoch."""
        return (step + 1) % self.cfg.LOG_EVERY == 0 or step + 1 == self.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """This process's part of the epoch's batches."""
        return augmented_batches(self.train_set, self.cfg, self.epoch, rank(), world_size())

    def inputs(self, batches: Iterable[Batch]) -> Iterator[StepInputs]:
        """The batches with the teacher's outputs on them."""
        return (inputs for (inputs,) in self._lessons.over(zip(batches), self.epoch))

    @cached_property
    def _lessons(self) -> Lessons:
        return Lessons(
            self.cfg, [[self.distiller]], self.device, obstacle=self.obstacle,
            kept=self.kept, seeds=[self.cfg.SEED],
        )  # fmt: skip

    def pace(self) -> Pace:
        """Return what times the epoch and shows its progress."""
        desc = f"epoch {self.epoch + 1}/{self.cfg.SOLVER.EPOCHS}"
        return Pace(desc, self.steps_per_epoch, self.cfg.SOLVER.BATCH_SIZE)

    def start_epoch(self) -> None:
        """Reset the losses, and make all processes draw different masks in this epoch."""
        if self.epoch == 0:
            self._keep_student()
        self.window, self._gradients = LossWindow(), {}
        if rank() > 0:  # the first one continues with its own state, as if alone
            seed_everything(stream_seed(self.cfg.SEED, self.epoch, PROCESS_STREAM, rank()))
        self.distiller.train()

    def finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate and write the epoch; :meth:`restore` completes what a kill leaves undone.

        Args:
            figures: of the epoch, besides the losses: its ``seconds`` and anything else to record.

        Raises:
            TrainingFailedError: a loss, or the student after the last step, is not finite.
        """
        start = time.perf_counter()
        means = self.read_losses()
        student = self.distiller.student
        average_buffers(student)  # before the check, so that all processes find the same
        if self.average is not None:
            average_buffers(self.average.model)
        self._check_student(means)
        self.epoch += 1
        evaluated = self._evaluated() if self._due(self.cfg.EVAL_EVERY) else {}
        if self.files is None:
            return
        whole = figures["seconds"] + time.perf_counter() - start
        self.seconds += whole
        record = {
            "epoch": self.epoch, **evaluated, "lr": self._scheduled[0], **means,
            **self._gradients, **figures
        }  # fmt: skip
        self.files.add_metrics(record)
        if evaluated and not self._told_of_chance:
            self._tell_of_chance(self.files, record["accuracy"])
        is_best = self.best["best_epoch"] == self.epoch
        self._keep_student()  # before the state: a resumed run would not write it
        # Also after the first and every best epoch, so that what is there can be resumed.
        if self._due(self.cfg.SAVE_EVERY) or self.epoch == 1 or is_best:
            self._save_models(self.files)
            self.files.save_state(self.state())
            self._saved_epoch = self.epoch
        if is_best:
            self.files.save_best(student)
        self._log(self.files, record, whole)

    def _keep_student(self) -> None:
        """Write the student permanently, if this epoch's is to be kept."""
        every = self.cfg.KEEP_EVERY
        if self.files is not None and every and self._due(every):
            self.files.keep(self.distiller.student, self.epoch)

    def _save_models(self, files: RunFolder) -> None:
        files.save_last(self.distiller.student)
        if self.average is not None:
            files.save_average(self.average.model)

    def _tell_of_chance(self, files: RunFolder, top1: float) -> None:
        from classification.batch_norm import lagging  # few runs need it

        losses = [record["loss_total"] for record in read_metrics(files.metrics)]
        for doubt in lagging(self.distiller.student, self.evaluation_set, top1, losses):
            files.logger.warning(doubt)
            self._told_of_chance = True

    def _due(self, every: int) -> bool:
        """Whether something done every ``every`` epochs, and after the last one, is due."""
        return self.epoch % every == 0 or self.epoch == self.cfg.SOLVER.EPOCHS

    def _evaluated(self) -> dict[str, float]:
        """Accuracies and, in the process that writes, the CKA of the stages."""
        student = self.distiller.student
        top1 = accuracy(student, self._pixels, self.evaluation_set)["top1"]
        if top1 > self.best["best_accuracy"]:
            self.best = {"best_accuracy": top1, "best_epoch": self.epoch}
        figures = {"accuracy": top1, "best_accuracy": self.best["best_accuracy"]}
        if self.average is not None:
            averaged = accuracy(self.average.model, self._pixels, self.evaluation_set)
            figures["accuracy_ema"] = averaged["top1"]
        if self.files is None or not self.taps:
            return figures
        assert self.distiller.teacher is not None  # without one there are no taps
        teacher = pixel_statistics(self.cfg.TEACHER).to(self.device), self.distiller.teacher.model
        aligned = stage_alignment((self._pixels, student), teacher, self.taps, self.evaluation_set)
        return figures | {f"cka_{stage}": value for stage, value in aligned.items()}

    def _check_student(self, means: dict[str, float]) -> None:
        """Refuse to keep a student that the last step broke, which no loss has seen yet."""
        state = self.distiller.state_dict()
        finite = torch.stack([v.isfinite().all().to(self.device) for v in state.values()])
        for name, is_finite in zip(state, finite.tolist(), strict=True):
            if not is_finite:
                terms = {key: v for key, v in means.items() if key.startswith("loss_")}
                with self._telling_failures():
                    raise NonFiniteLossError(f"the last step ({name}), after mean losses", terms)

    @contextmanager
    def _telling_failures(self) -> Iterator[None]:
        """Add to a non-finite error where it occurred, and what may help."""
        try:
            yield
        except NonFiniteLossError as error:
            kept = "none yet"
            if self._saved_epoch:
                kept = f"{Path(self.cfg.OUTPUT_DIR) / CHECKPOINT} (epoch {self._saved_epoch})"
            raise TrainingFailedError(
                f"epoch {self.epoch + 1} is {error}; last good checkpoint: {kept}. What may help: "
                "a lower SOLVER.BASE_LR or loss weight, SOLVER.WARMUP_EPOCHS, DISTILL.WARMUP"
            ) from error

    def state(self) -> dict[str, object]:
        """Return all that the next epoch depends on, loadable without running code."""
        average = {} if self.average is None else {"ema": self.average.model.state_dict()}
        return average | {
            "epoch": self.epoch,
            "best": self.best,
            "seconds": self.seconds,
            "student": self.distiller.student.state_dict(),
            "losses": self.distiller.losses.state_dict(),
            "adapters": self.distiller.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": capture_random_state(),
            "config": self.cfg.dump(),
            "images": [self.train_set.fingerprint, self.evaluation_set.fingerprint],
        }

    def restore(self, state: dict) -> None:
        """Resume from :meth:`state`, with any number of processes."""
        self.epoch, self.best, self.seconds = state["epoch"], state["best"], state["seconds"]
        for part in ("student", "losses", "adapters"):
            getattr(self.distiller, part).load_state_dict(state[part])
        if self.average is not None:
            self.average.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        read_rate_from(self._rate, self.optimizer)
        restore_random_state(state["random"])
        self._saved_epoch = self.epoch
        if self.files is not None:  # a kill may have come between the files of an epoch
            self._save_models(self.files)
            if self.best["best_epoch"] == self.epoch:
                self.files.save_best(self.distiller.student)

    def changed_tensors(self) -> list[Tensor]:
        """Return all tensors that :meth:`update` changes in place."""
        tensors = [*self.distiller.parameters(), *self.distiller.buffers()]
        tensors += optimizer_tensors(self.optimizer)
        if self.average is not None:
            tensors += self.average.tensors()
        if self.cfg.SOLVER.ACCUMULATE > 1:  # else no step starts from gradients
            tensors += [p.grad for p in self.distiller.parameters() if p.grad is not None]
        return tensors

    def _log(self, files: RunFolder, record: dict[str, float], seconds: float) -> None:
        parts = [f"{name} {v:.4f}" for name, v in record.items() if name.startswith("loss_")]
        if "accuracy" in record:
            parts += ["", f"accuracy {record['accuracy']:.2f} %"]
            if "accuracy_ema" in record:
                parts += [f"(averaged {record['accuracy_ema']:.2f} %)"]
            parts += ["", f"best {record['best_accuracy']:.2f} %"]
        files.logger.info(
            "epoch %d/%d  %s  lr %.4g  %.1f s (%.1f s of training, %.0f img/s)",
            *(self.epoch, self.cfg.SOLVER.EPOCHS, " ".join(parts), record["lr"], seconds),
            *(record["seconds"], record["images_per_second"]),
        )


def _obstacle(trainer: Trainer) -> str | None:
    """Return why the step cannot be a CUDA graph; "" if not requested, None if it can be."""
    if trainer.device.type != "cuda" or not trainer.cfg.CUDA_GRAPH:
        return ""
    if world_size() > 1:
        return "several processes train together"
    if unfit := [type(loss).__name__ for loss in trainer.distiller.losses if not loss.capturable]:
        return f"{', '.join(unfit)} cannot be part of one"
    return None
