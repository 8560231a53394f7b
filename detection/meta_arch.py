"""A detector or segmenter that learns from a teacher, as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from detection.architectures import MODULES
from detection.backbones import build_p6p7_resnet_fpn_backbone
from detection.config import build_student, student_architecture
from detection.levels import build_losses, match_levels, needs_head, reads_levels
from detection.pixels import LEVEL, TAP, names_pixels, pixel_shape
from detection.teacher import HEAD, TeacherBackbone, TeacherDetector, build_teacher
from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.engine.preflight import naming
from pcka.losses import Loss, Outputs
from pcka.losses.heads import PixelHead
from pcka.losses.numerics import at_one_size
from pcka.modes import evaluation_mode
from pcka.ops import cka
from pcka.taps import FeatureTap
from pcka.teacher import FrozenTeacher

if TYPE_CHECKING:
    from detection.heads import Parts

DRY_RUN_SIDE = 256


@META_ARCH_REGISTRY.register()
class DistilledDetector(nn.Module):
    """A student trained with its own losses and with losses that compare it with a teacher.

    In training, a batch yields the student's loss terms and those of a :class:`pcka.Distiller`,
    each under its own name. In inference, the module behaves exactly like the student. With several
    processes, each compares only the maps of its own batch, since those of the others have other
    sizes. The losses' target is the boxes of the objects, if a loss needs them.

    Args:
        student: any detectron2 model with a ``backbone`` that returns named maps.
        teacher: from :func:`detection.teacher.build_teacher`, with its head if a loss needs it;
            None for a student that trains without a teacher.
        losses: from :mod:`pcka.losses`, on taps named like the student's levels.
        levels: student level -> teacher level.
        log_period: steps between logged alignments and gradient norms of the levels; 0: never.

    Raises:
        ConfigError: a loss cannot read or compare the heads.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        losses: Sequence[Loss],
        levels: Mapping[str, str],
        log_period: int = 0,
    ) -> None:
        super().__init__()
        taps = {own: (_path(own), f":{other}") for own, other in levels.items()}
        self.distiller = Distiller(student, teacher, losses, taps, gather=False)
        self.log_period = log_period
        self._needs_boxes = any(loss.needs_boxes for loss in losses)
        self._head: Parts | None = None
        pixels = LEVEL in {*levels, *levels.values()}
        if teacher is not None and (pixels or any(loss.needs_head for loss in losses)):
            from detection.heads import read_heads  # most runs need none of its modules

            whole = cast(TeacherDetector, teacher.model)
            self._head = read_heads(student, whole, losses, pixels=pixels)
        if teacher is not None:
            with naming("DISTILL"):
                self._prepare()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the arguments of ``__init__``, from ``DISTILL``."""
        check_exportable(cfg)
        student: Any = build_student(cfg)
        if not cfg.DISTILL.METHODS:
            return {"student": student, "teacher": None, "losses": [], "levels": {}}
        pixels = names_pixels(cfg.DISTILL.LEVELS)
        teacher = build_teacher(cfg, with_head=has_head(cfg))
        shapes = student.backbone.output_shape()
        teacher_shapes = cast(TeacherBackbone, teacher.model).output_shape()
        if pixels:
            shapes = {**shapes, **pixel_shape(student)}
            teacher_shapes = {**teacher_shapes, **pixel_shape(cast(Any, teacher.model).detector)}
        wanted = cfg.DISTILL.LEVELS
        levels = {}  # for losses on heads only, whose models may name their levels differently
        if wanted or reads_levels(cfg.DISTILL.METHODS):
            levels = match_levels(wanted, shapes, teacher_shapes)
        return {
            "student": student,
            "teacher": teacher,
            "losses": build_losses(cfg, levels, shapes),
            "levels": levels,
            "log_period": cfg.DISTILL.LOG_PERIOD,
        }

    @property
    def student(self) -> nn.Module:
        """The plain detectron2 detector."""
        return self.distiller.student

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The frozen teacher, which is not a submodule."""
        return self.distiller.teacher

    @property
    def device(self) -> torch.device:
        """The student's device."""
        return cast(torch.device, self.student.device)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return loss terms by name in training, the student's detections in inference.

        Args:
            batched_inputs: as detectron2's data loaders return them.

        Raises:
            ValueError: two losses return a term of the same name, or a loss returns none.
        """
        if not self.training or self.teacher is None:
            return self.student(batched_inputs)
        # Both models would move the images to the device; moving them here does it once.
        images = [entry["image"].to(self.device) for entry in batched_inputs]
        batched_inputs = [{**entry, "image": i} for entry, i in zip(batched_inputs, images)]
        watched = nullcontext() if self._head is None else self._head.watched()
        with FeatureTap(self.student, {"canvas": "backbone:input"}) as tap, watched as watch:
            student = self.distiller.observe_student(batched_inputs)
            canvas = tap.pop()["canvas"].shape[-2:]
        teacher = self.distiller.observe_teacher(images, canvas)
        if watch is not None:
            teacher = _with_head(teacher)
            student = replace(student, head=watch.given(cast(Any, teacher.head)))
        target = _boxes(batched_inputs, canvas, self.device) if self._needs_boxes else None
        if self.log_period > 0 and get_event_storage().iter % self.log_period == 0:
            student = _log_levels(student, teacher)
        terms: dict[str, Tensor] = dict(student.raw)
        for name, term in self.distiller.terms(student, teacher, target).items():
            if name in terms:
                raise ConfigError(f"DISTILL.METHODS: a loss and the student both give {name}")
            terms[name] = term.weighted
        return terms

    @torch.no_grad()
    def _prepare(self) -> None:
        """Size the adapters with a dry run of both backbones, and of the heads that losses read."""
        backbone, canvas = self.student.get_submodule("backbone"), (DRY_RUN_SIDE, DRY_RUN_SIDE)
        teacher = self.distiller.observe_teacher([torch.zeros(3, *canvas)] * 2, canvas)
        with evaluation_mode(self.student):
            device = next(backbone.parameters()).device
            student = Outputs(features=backbone(torch.zeros(2, 3, *canvas, device=device)))
            if self._head is not None:
                teacher = _with_head(teacher)
                head = self._head.run(student.features, cast(Any, teacher.head))
                features = dict(student.features)
                if isinstance(head, PixelHead):
                    features[LEVEL] = head.features
                student = replace(student, head=head, features=features)
        self.distiller.prepare_for(student, teacher)


def has_head(cfg: CfgNode) -> bool:
    """Whether a run's teacher is built with its head.

    Raises:
        ConfigError: there is no loss of a given name.
    """
    keys = cfg.DISTILL
    return keys.TEACHER.HEAD or names_pixels(keys.LEVELS) or needs_head(keys.METHODS)


def check_exportable(cfg: CfgNode) -> None:
    """Refuse a student that plain detectron2 could not load.

    Raises:
        ConfigError: its backbone is known only to this project.
    """
    architecture, backbone = student_architecture(cfg), cfg.MODEL.BACKBONE.NAME
    # A LazyConfig describes the pyramid without its registered name.
    if backbone == build_p6p7_resnet_fpn_backbone.__name__ and architecture not in MODULES:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME: plain detectron2 does not know {backbone!r}; give a "
            f"{architecture} one of its own, e.g. 'build_retinanet_resnet_fpn_backbone'"
        )


def _path(level: str) -> str:
    """Path of a level in a student."""
    return TAP if level == LEVEL else f"backbone:{level}"


def _with_head(teacher: Outputs | None) -> Outputs:
    """Return the teacher's outputs with those of its head."""
    assert teacher is not None  # a loss reads its head
    return replace(teacher, head=teacher.raw[HEAD])


def _boxes(
    batched_inputs: list[dict[str, Any]], canvas: Sequence[int], device: torch.device
) -> Tensor:
    """The objects of a batch, ``(M, 5)``: image, and x0, y0, x1, y1 as fractions of the canvas."""
    height, width = canvas
    size = torch.tensor([width, height, width, height], device=device)
    rows = []
    for image, entry in enumerate(batched_inputs):
        if "instances" not in entry:
            raise ConfigError(
                "DISTILL.METHODS: FGD, or PCKA with a BACKGROUND below 1, needs the boxes of the "
                f"objects, but {entry.get('file_name')!r} has none; use another method"
            )
        boxes = entry["instances"].gt_boxes.tensor.to(device, torch.float32) / size
        rows.append(F.pad(boxes, (1, 0), value=image))
    return torch.cat(rows)


def _log_levels(student: Outputs, teacher: Outputs | None) -> Outputs:
    """Log the levels' alignments and gradient norms; return the outputs to pass to the losses.

    ``cka/<level>`` is the alignment of both maps over positions, ``X (B * H * W, C)``;
    ``distill_grad/<level>`` is the norm of the losses' gradient with respect to the student's map.
    """
    assert teacher is not None  # every loss of a detector needs it
    storage = get_event_storage()
    watched = {}
    for level, feature in student.features.items():
        pair = at_one_size(feature.detach(), teacher.feature(level))
        rows = (maps.movedim(1, -1).flatten(0, 2) for maps in pair)
        storage.put_scalar(f"cka/{level}", cka(*rows).item(), smoothing_hint=False)
        watched[level] = _log_gradient(level, feature)
    return replace(student, features=watched)


def _log_gradient(level: str, feature: Tensor) -> Tensor:
    """Return a view of the map, whose gradient is that of the distillation losses alone."""
    storage = get_event_storage()
    branch = feature.view_as(feature)
    branch.register_hook(
        lambda grad: storage.put_scalar(
            f"distill_grad/{level}", grad.norm().item(), smoothing_hint=False
        )
    )
    return branch
