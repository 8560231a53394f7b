"""detectron2's training loop around a distilled detector."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer, default_writers, hooks
from detectron2.layers import ROIAlign, ROIAlignRotated
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detection.checkpoint import SafeCheckpointer, WeightsError
from detection.compat import open_loader
from detection.config import DISTILLED, build, build_student, teacher_config
from detection.data.loader import training_loader
from detection.data.targets import check_test_sets, training_set
from detection.evaluation import evaluate, without_nan
from detection.figures import MetricsState, RestoreMetrics, plot_run
from detection.inherit import teacher_weights, unlike_images
from detection.meta_arch import DistilledDetector
from detection.run_state import RunState, lent_random_states
from detection.schedule import build_schedule
from detection.teacher_checks import check_teacher
from pcka.distributed import OWN_BUFFERS, average_buffers
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.inherit import inherit_weights
from pcka.files import CheckpointError

logger = logging.getLogger("detectron2.pcka")


def student_of(model: nn.Module) -> nn.Module:
    """Return the plain detectron2 detector of a model, whether wrapped or not."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.student if isinstance(model, DistilledDetector) else model


class DetectionTrainer(SimpleTrainer):
    """Trains what ``MODEL.META_ARCHITECTURE`` names, and can resume where it stopped.

    A checkpoint holds the bare student under ``"model"``, which plain detectron2 can load, together
    with the optimizer, the schedule, the adapters' and the losses' weights, the metrics and the
    random states. It never holds the teacher.

    Args:
        cfg: the run's configuration.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``, if there is one.
        teacher_is_tried: skip :func:`detection.teacher_checks.check_teacher`, already done.

    Raises:
        ConfigError: the checkpoint is damaged or belongs to another configuration.
    """

    def __init__(self, cfg: CfgNode, *, resume: bool, teacher_is_tried: bool = False) -> None:
        dataset = training_set(cfg)
        check_test_sets(cfg)
        if cfg.MODEL.META_ARCHITECTURE == DISTILLED:
            model = build_model(cfg)
        else:
            model = build_student(cfg).to(cfg.MODEL.DEVICE)
        student = student_of(model)
        optimizer = build(partial(build_optimizer, model=model), cfg, "SOLVER")
        self.scheduler = build(partial(build_schedule, optimizer=optimizer), cfg, "SOLVER")
        self.run_state = RunState(student)
        self.metrics = MetricsState(Path(cfg.OUTPUT_DIR, "metrics.json"))
        parts = {
            "optimizer": optimizer,
            "scheduler": self.scheduler,
            "run": self.run_state,
            "metrics": self.metrics,
        }
        if isinstance(model, DistilledDetector):
            parts["adapters"], parts["losses"] = model.distiller.adapters, model.distiller.losses
        self.cfg = cfg
        self.checkpointer = SafeCheckpointer(student, cfg.OUTPUT_DIR, **parts)
        resumed = resume and self.checkpointer.has_checkpoint()
        found = self._load(resumed=resumed)
        if not resumed and cfg.DISTILL.INHERIT:
            own = teacher_config(cfg)
            given = teacher_weights(student, own.MODEL.WEIGHTS)
            unlike = unlike_images(cfg, own)
            inherit_weights(student, given, cfg.DISTILL.INHERIT, logger, unlike=unlike)
        teacher = model.teacher if isinstance(model, DistilledDetector) else None
        if not resumed and not teacher_is_tried and teacher is not None:
            check_teacher(teacher, cfg, dataset)
        start = found["iteration"] + 1 if resumed else 0
        if cfg.SOLVER.AMP.ENABLED:
            train_in_bfloat16(model)
        super().__init__(_distributed(model, cfg), training_loader(cfg, dataset, start), optimizer)
        self.start, self.last = start, cfg.SOLVER.MAX_ITER
        self.register_hooks(self._hooks_of_run())

    def _load(self, *, resumed: bool) -> dict[str, Any]:
        if not resumed:
            try:
                return self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=False)
            except (ValueError, AssertionError, OSError) as error:
                raise ConfigError(f"MODEL.WEIGHTS: {error}") from error
        try:
            found = self.checkpointer.resume_or_load("", resume=True)
        except (CheckpointError, AssertionError) as error:  # damaged or missing
            raise ConfigError(f"{error}; {self.checkpointer.way_on()}") from error
        except (ValueError, RuntimeError) as error:
            unlike = ", ".join(self._unlike_parts())
            if isinstance(error, RuntimeError) and not unlike:
                raise
            reason = f"it has different weights of {unlike}" if unlike else error
            raise ConfigError(
                f"{self.cfg.OUTPUT_DIR}: its checkpoint is from another configuration ({reason}); "
                "resume with the run's own, or use another OUTPUT_DIR"
            ) from error
        if "iteration" not in found:
            raise WeightsError(
                f"{self.checkpointer.get_checkpoint_file()}: has no training state to resume"
            )
        return found

    def _unlike_parts(self) -> list[str]:
        """Return the losses and adapters whose weights do not match the last checkpoint's."""
        saved = self.checkpointer._load_file(self.checkpointer.get_checkpoint_file())
        parts_here = self.checkpointer.checkpointables.items()
        names = {f"losses.{i}": name for i, name in enumerate(self.cfg.DISTILL.METHODS)}
        own, its = (
            {
                f"{part}.{name}": tensor.shape
                for part in ("adapters", "losses")
                for name, tensor in parts.get(part, {}).items()
            }
            for parts in ({name: part.state_dict() for name, part in parts_here}, saved)
        )
        owners = {".".join(name.split(".")[:2]) for name, _ in own.items() ^ its.items()}
        return [names.get(owner, owner) for owner in sorted(owners)]

    def train_all(self) -> dict[str, Any]:
        """Train to ``SOLVER.MAX_ITER``; return the last evaluation."""
        open_loader(self)  # draws a seed
        self.run_state.restore_random()
        # detectron2's focal loss is TorchScript, which rounds differently after profiling its first
        # calls. A resumed run would profile again and diverge from an uninterrupted one. On a GPU,
        # where runs are not bitwise reproducible anyway, its fused kernels save memory traffic.
        with torch.jit.optimized_execution(student_of(self.model).device.type != "cpu"):
            try:
                super().train(self.start, self.last)
            except FloatingPointError as error:  # raised by detectron2 for a non-finite loss
                raise TrainingFailedError(
                    f"{error}; SOLVER.BASE_LR may be too high, or SOLVER.WARMUP_ITERS too low"
                ) from error
        return self.results

    def _hooks_of_run(self) -> list[HookBase]:
        """Schedule, then checkpoint, evaluation, writing: each sees the effects of those before."""
        self.results: dict[str, Any] = {}
        cfg = self.cfg
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        found: list[HookBase] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, self.scheduler),
            _AverageBuffers(student_of(self.model), {period, cfg.TEST.EVAL_PERIOD}),
        ]
        if comm.is_main_process():
            found.append(hooks.PeriodicCheckpointer(self.checkpointer, period))
        found.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
        if comm.is_main_process():
            writers = default_writers(cfg.OUTPUT_DIR, self.last)
            found.append(RestoreMetrics(self.metrics, writers))
            found.append(hooks.PeriodicWriter(writers, period=cfg.DISTILL.LOG_PERIOD or 20))
            found.append(hooks.CallbackHook(after_train=lambda _: plot_run(cfg.OUTPUT_DIR)))
        return found

    def _evaluate(self) -> dict[str, Any]:
        # The loader draws a seed, and detectron2's resizing a size. A resumed run, which starts
        # from the checkpoint before this evaluation, would draw other numbers than this one.
        with lent_random_states():
            self.results = evaluate(self.cfg, student_of(self.model))
        return without_nan(self.results)  # metrics are written as JSON, which has no NaN


class _AverageBuffers(HookBase):
    """Gives all processes the same batch-norm statistics before they are saved or evaluated.

    Args:
        model: model whose buffers are averaged; in between every process keeps its own.
        periods: steps between reads of the buffers; 0: never.
    """

    def __init__(self, model: nn.Module, periods: set[int]) -> None:
        self.model = model
        self.periods = periods - {0}

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            average_buffers(self.model)


def train_in_bfloat16(model: nn.Module) -> None:
    """Run the model's forward pass in training under autocast to bfloat16.

    bfloat16 has the range of float32: unlike detectron2's float16 it needs no loss scaling, and it
    also trains on CPUs. Weights, gradients and evaluations stay in float32.
    """
    exact = model.forward
    device = cast(torch.device, model.device)
    rounding = torch.autocast(device.type, torch.bfloat16)(exact)
    model.forward = lambda batch: (rounding if model.training else exact)(batch)
    for module in model.modules():
        if isinstance(module, ROIAlign | ROIAlignRotated):
            # They cast the boxes to the features' dtype: bfloat16 would shift them by pixels.
            module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))


def _distributed(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Average gradients over the processes; with gloo, processes have no device of their own."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if cfg.MODEL.DEVICE != "cpu" else None
    return DistributedDataParallel(model, device_ids=devices, **OWN_BUFFERS)
