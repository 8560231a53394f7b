"""Training one student: its loop, its steps, its figures, and the state that it goes on from."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classification.data import Batch, ImageSet, pixel_statistics, steps_per_epoch
from classification.data.batches import PROCESS_STREAM, stream_seed
from classification.dot import DistillationOriented
from classification.evaluation import accuracy, stage_alignment
from classification.teacher import Lessons, StepInputs
from pcka.distiller import Distiller
from pcka.distributed import OWN_BUFFERS, average_buffers, rank, world_size
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
from pcka.engine.run_folder import CHECKPOINT, RunFolder


@dataclass(eq=False)
class Trainer:
    """Trains ``distiller.student`` and writes an epoch's state and figures when it is complete.

    On a CUDA device the step is recorded as a graph and replayed where that can be: it then costs
    the device's work alone, not the time that Python takes to launch it.

    Args:
        cfg: the run's configuration.
        distiller: on the device that trains, its losses prepared.
        taps: stage name -> (student path, teacher path), followed by CKA; empty without a teacher.
        train_set: on that device.
        evaluation_set: on that device.
        files: of the run; None in all processes but the first, which alone writes.

    Attributes:
        epoch: number of epochs completed.
        best: accuracy (percent) and number of the best epoch so far.
        seconds: of all epochs, their evaluation included.
        measures_gradients: the step that comes looks at the gradient of each term.
    """

    cfg: CfgNode
    distiller: Distiller
    taps: dict[str, tuple[str, str]]
    train_set: ImageSet
    evaluation_set: ImageSet
    files: RunFolder | None

    def __post_init__(self) -> None:
        cfg, distiller = self.cfg, self.distiller
        self.device = self.train_set.device
        self.steps_per_epoch = steps_per_epoch(self.train_set, cfg, world_size())
        self.epoch = 0
        self.best = {"best_accuracy": -1.0, "best_epoch": 0}
        self.seconds = 0.0
        self.window = LossWindow()
        self.measures_gradients = False
        self._gradients: dict[str, float] = {}
        self._pixels = pixel_statistics(cfg.STUDENT).to(self.device)
        # On the device, so that a recorded step reads what is written here: the learning rate,
        # and the factor of the distillation terms.
        self._rate = torch.zeros((), device=self.device)
        self._scale = torch.zeros((), device=self.device)
        self._scheduled = (0.0, 0.0)
        if cfg.DISTILL.WARMUP:
            distiller.distillation_scale = self._scale
        self.optimizer = _optimizer(cfg, distiller)
        self._read_rate_from_the_device()
        self._model: nn.Module = distiller
        if world_size() > 1 and not isinstance(self.optimizer, DistillationOriented):
            self._model = _data_parallel(distiller)
        self.obstacle = _obstacle(self)
        self._update = Recorded(self.update, self.changed_tensors, obstacle=self.obstacle)
        self._saved_epoch = 0
        self._terms: tuple[str, ...] = ()

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            TrainingFailedError: a loss, or the student, is not finite.
        """
        while self.epoch < self.cfg.SOLVER.EPOCHS:
            self.train_epoch()

    def train_epoch(self) -> None:
        """Train one epoch, and evaluate and write it."""
        self.start_epoch()
        with self.pace() as pace:
            for step, inputs in enumerate(self.inputs(pace.watch(self.batches()))):
                self.step(inputs, step)
                pace.count_step()
                if self.reads_after(step):
                    pace.show(loss=self.read_losses()["loss_total"])
        self.finish_epoch(pace.figures())

    def step(self, inputs: StepInputs, step: int) -> None:
        """Update by this process's part of a batch, the epoch's ``step``-th, counted from 0."""
        self.set_schedule(step)
        update = self.update if self.measures_gradients else self._update
        self.keep_losses(update(inputs).clone())

    def update(self, inputs: StepInputs) -> Tensor:
        """One step of the optimizer, by work on the device alone: it can be recorded and replayed.

        Returns:
            The loss terms and, last, their sum, ``(T + 1,)`` float32; for :meth:`keep_losses`.
        """
        layout = torch.channels_last if self.cfg.CHANNELS_LAST else torch.contiguous_format
        images = self._pixels(inputs.images).contiguous(memory_format=layout)
        with autocast(self.cfg.AUTOCAST, self.device):
            terms = self._model(
                images, inputs.labels, indices=inputs.indices, teacher_outputs=inputs.teacher
            )
        if self.measures_gradients:
            self._gradients = _gradient_figures(terms, self.distiller.student)
        values = torch.stack(list(terms.values()))
        total = values.sum()
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, DistillationOriented):
            parts: dict[bool, list[Tensor]] = {False: [], True: []}
            for name, value in terms.items():
                parts[name in self.distiller.taught_terms].append(value)
            self.optimizer.backward(task=parts[False], taught=parts[True])
        else:
            total.backward()
        self.optimizer.step()
        self._terms = (*terms, "loss_total")
        return torch.cat([values.detach(), total.detach()[None]]).float()

    def set_schedule(self, step: int) -> None:
        """Set what the step of the epoch trains with, and whether gradients are measured in it."""
        progress = self.epoch + step / self.steps_per_epoch
        values = learning_rate(self.cfg, progress), distillation_scale(self.cfg, progress)
        if values != self._scheduled:  # mostly they stay
            self._rate.fill_(values[0])
            self._scale.fill_(values[1])
            self._scheduled = values
        every, epoch = self.cfg.GRADIENTS_EVERY, self.epoch + 1
        due = every and (epoch % every == 0 or epoch == self.cfg.SOLVER.EPOCHS)
        self.measures_gradients = bool(due and step + 1 == self.steps_per_epoch)

    def keep_losses(self, terms: Tensor) -> None:
        """Keep what :meth:`update` returned for the epoch's means."""
        self.window.add(self._terms, terms)

    def read_losses(self) -> dict[str, float]:
        """The means of the epoch so far; waits for the device and for all processes.

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
        return self.train_set.training_batches(self.cfg, self.epoch, rank(), world_size())

    def inputs(self, batches: Iterable[Batch]) -> Iterator[StepInputs]:
        """The batches with what the teacher says of them."""
        return (inputs for (inputs,) in self._lessons.over(zip(batches)))

    @cached_property
    def _lessons(self) -> Lessons:
        return Lessons(self.cfg, [[self.distiller]], self.device, obstacle=self.obstacle)

    def pace(self) -> Pace:
        """What times the epoch and shows how far it is."""
        desc = f"epoch {self.epoch + 1}/{self.cfg.SOLVER.EPOCHS}"
        return Pace(desc, self.steps_per_epoch, self.cfg.SOLVER.BATCH_SIZE)

    def start_epoch(self) -> None:
        """Forget the losses of the last epoch; no two processes draw the same masks in this one."""
        self.window, self._gradients = LossWindow(), {}
        if rank() > 0:  # the first one goes on with its own, as if it were alone
            seed_everything(stream_seed(self.cfg.SEED, self.epoch, PROCESS_STREAM, rank()))
        self.distiller.train()

    def finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate and write the epoch; :meth:`restore` mends what a kill leaves undone.

        Args:
            figures: of the epoch, beside the losses: its ``seconds`` and whatever else is to be
                written down.

        Raises:
            TrainingFailedError: the last step broke the student.
        """
        start = time.perf_counter()
        means = self.read_losses()
        student = self.distiller.student
        average_buffers(student)  # before the check, which then finds the same in all processes
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
        is_best = self.best["best_epoch"] == self.epoch
        # After the first epoch, too, and with the best one: what is there can be gone on from.
        if self._due(self.cfg.SAVE_EVERY) or self.epoch == 1 or is_best:
            self.files.save_last(student)
            self.files.save_state(self.state())
            self._saved_epoch = self.epoch
        if is_best:
            self.files.save_best(student)
        self._log(self.files, record, whole)

    def _due(self, every: int) -> bool:
        """Whether what is done every so many epochs, and after the last one, is to be done."""
        return self.epoch % every == 0 or self.epoch == self.cfg.SOLVER.EPOCHS

    def _evaluated(self) -> dict[str, float]:
        """Accuracies and, in the process that writes, the CKA of the stages."""
        student = self.distiller.student
        top1 = accuracy(student, self._pixels, self.evaluation_set)["top1"]
        if top1 > self.best["best_accuracy"]:
            self.best = {"best_accuracy": top1, "best_epoch": self.epoch}
        figures = {"accuracy": top1, "best_accuracy": self.best["best_accuracy"]}
        if self.files is None or not self.taps:
            return figures
        assert self.distiller.teacher is not None  # without one there are no taps
        teacher = pixel_statistics(self.cfg.TEACHER).to(self.device), self.distiller.teacher.model
        aligned = stage_alignment((self._pixels, student), teacher, self.taps, self.evaluation_set)
        return figures | {f"cka_{stage}": value for stage, value in aligned.items()}

    def _check_student(self, means: dict[str, float]) -> None:
        """Refuse to keep a student that the last step broke: no loss has seen it yet."""
        state = self.distiller.state_dict()
        finite = torch.stack([v.isfinite().all().to(self.device) for v in state.values()])
        for name, is_finite in zip(state, finite.tolist(), strict=True):
            if not is_finite:
                terms = {key: v for key, v in means.items() if key.startswith("loss_")}
                with self._telling_failures():
                    raise NonFiniteLossError(f"the last step ({name}), after mean losses", terms)

    @contextmanager
    def _telling_failures(self) -> Iterator[None]:
        """Say of what is not finite where it happened, and what may help."""
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
        return {
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
        """Go on from :meth:`state`, with any number of processes."""
        self.epoch, self.best, self.seconds = state["epoch"], state["best"], state["seconds"]
        for part in ("student", "losses", "adapters"):
            getattr(self.distiller, part).load_state_dict(state[part])
        self.optimizer.load_state_dict(state["optimizer"])
        self._read_rate_from_the_device()
        restore_random_state(state["random"])
        self._saved_epoch = self.epoch
        if self.files is not None:  # a kill may have come between the three files of an epoch
            self.files.save_last(self.distiller.student)
            if self.best["best_epoch"] == self.epoch:
                self.files.save_best(self.distiller.student)

    def _read_rate_from_the_device(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def changed_tensors(self) -> list[Tensor]:
        """All that :meth:`update` changes in place: the model, the losses, the momentum."""
        trained = self.distiller
        return [*trained.parameters(), *trained.buffers(), *_momenta(self.optimizer)]

    def _log(self, files: RunFolder, record: dict[str, float], seconds: float) -> None:
        parts = [f"{name} {v:.4f}" for name, v in record.items() if name.startswith("loss_")]
        if "accuracy" in record:
            parts += ["", f"accuracy {record['accuracy']:.2f} %"]
            parts += ["", f"best {record['best_accuracy']:.2f} %"]
        files.logger.info(
            "epoch %d/%d  %s  lr %.4g  %.1f s (%.1f s of training, %.0f img/s)",
            *(self.epoch, self.cfg.SOLVER.EPOCHS, " ".join(parts), record["lr"], seconds),
            *(record["seconds"], record["images_per_second"]),
        )


def _optimizer(cfg: CfgNode, distiller: Distiller) -> torch.optim.Optimizer:
    """What ``SOLVER`` and ``DISTILL.DOT_DELTA`` ask for, of all that is trained."""
    solver, delta = cfg.SOLVER, cfg.DISTILL.DOT_DELTA
    settings = {
        "lr": solver.BASE_LR, "momentum": solver.MOMENTUM, "weight_decay": solver.WEIGHT_DECAY
    }  # fmt: skip
    if not delta:
        return torch.optim.SGD(
            distiller.parameters(), fused=True, nesterov=solver.NESTEROV, **settings
        )
    return DistillationOriented(distiller.parameters(), delta=delta, **settings)


def _momenta(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer changes beside the parameters; SGD's are made, if they are not there yet.

    They are what a first step starts from, and so are there to be put back after a recording.
    """
    if isinstance(optimizer, DistillationOriented):
        return optimizer.velocities()
    momenta = []
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momenta.append(state["momentum_buffer"])
    return momenta


def _gradient_figures(terms: dict[str, Tensor], student: nn.Module) -> dict[str, float]:
    """What ``metrics.jsonl`` says of the gradient of each term, on this process's batch."""
    from pcka.analysis.gradients import term_gradients  # few runs ask for it

    task = "loss_ce"  # without it there are no cosines, which would be those with another term
    found = term_gradients(
        terms, student.parameters(), task if task in terms else next(iter(terms))
    )
    return {
        f"gradient_{what}_{name.removeprefix('loss_')}": value
        for name, measured in found.items()
        for what, value in measured._asdict().items()
        if what == "share" or task in terms
    }


def _data_parallel(distiller: Distiller) -> DistributedDataParallel:
    """Average gradients over processes; every process keeps the buffers that it computes."""
    uses_logits = any(loss.needs_logits for loss in distiller.losses)
    return DistributedDataParallel(distiller, find_unused_parameters=not uses_logits, **OWN_BUFFERS)


def _obstacle(trainer: Trainer) -> str | None:
    """Why the step cannot be a CUDA graph, "" where nobody asks for one; None where it can be."""
    if trainer.device.type != "cuda" or not trainer.cfg.CUDA_GRAPH:
        return ""
    if world_size() > 1:
        return "several processes train together"
    if unfit := [type(loss).__name__ for loss in trainer.distiller.losses if not loss.capturable]:
        return f"{', '.join(unfit)} cannot be part of one"
    return None


def learning_rate(cfg: CfgNode, progress: float) -> float:
    """Return the rate of the step that starts at ``progress``.

    ``BASE_LR`` times ``GAMMA^(milestones passed)`` (multistep) or ``(1 + cos(pi * progress /
    EPOCHS)) / 2`` (cosine), times ``progress / WARMUP_EPOCHS`` while that is below 1.

    Args:
        cfg: the section ``SOLVER`` is read.
        progress: epochs trained so far, with a fraction within an epoch.
    """
    solver = cfg.SOLVER
    if solver.SCHEDULE == "cosine":
        factor = (1 + math.cos(math.pi * progress / solver.EPOCHS)) / 2
    else:
        factor = solver.GAMMA ** bisect_right(sorted(solver.MILESTONES), progress)
    if progress < solver.WARMUP_EPOCHS:
        factor *= progress / solver.WARMUP_EPOCHS
    return solver.BASE_LR * factor


def distillation_scale(cfg: CfgNode, progress: float) -> float:
    """Return the factor of the distillation terms: linear up to 1 in the share ``WARMUP`` of a run.

    Args:
        cfg: ``DISTILL.WARMUP`` and ``SOLVER.EPOCHS`` are read.
        progress: epochs trained so far, with a fraction within an epoch.
    """
    warmup = cfg.DISTILL.WARMUP * cfg.SOLVER.EPOCHS
    return progress / warmup if progress < warmup else 1.0
