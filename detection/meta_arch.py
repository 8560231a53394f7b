"""A detector that learns from another one, as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from typing_extensions import Self

from detection.backbones import build_p6p7_resnet_fpn_backbone
from detection.config import student_architecture
from detection.levels import match_levels, match_map
from detection.methods import build_losses
from detection.teacher import TeacherBackbone, build_teacher
from pcka.engine.config import ConfigError
from pcka.losses import Loss, Outputs
from pcka.modes import evaluation_mode
from pcka.ops import cka

DRY_RUN_SIDE = 256


class BackboneTap:
    """Keeps what a backbone was given and what it returned, for the length of a ``with`` block.

    Args:
        backbone: images ``(B, 3, H, W)`` -> level -> map.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.features: dict[str, Tensor] = {}
        self.canvas: tuple[int, int] = (0, 0)
        self._handle = backbone.register_forward_hook(self._keep)

    def __enter__(self) -> BackboneTap:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...], output: dict[str, Tensor]) -> None:
        height, width = inputs[0].shape[-2:]
        self.canvas = height, width
        self.features = dict(output)


@META_ARCH_REGISTRY.register()
class DistilledDetector(nn.Module):
    """A student, trained by its own losses and by losses that compare its feature maps.

    In training a batch gives the student's loss terms and the distillation's, each under its own
    name. In inference it is exactly the student. The teacher is held beside the module, not in it:
    it is in neither ``state_dict`` nor ``parameters``, but follows ``.to()``.

    Args:
        student: any detectron2 detector with a ``backbone`` that returns named maps.
        teacher: gives the teacher's maps; None for a student that trains by itself.
        losses: of :mod:`pcka.losses`, on taps named like the student's levels.
        levels: student level -> teacher level.
        log_period: steps between logged alignments and gradient norms of the levels; 0 for never.

    Raises:
        ConfigError: a level that the backbones do not have, or losses without a teacher.
    """

    teacher: TeacherBackbone | None

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: TeacherBackbone | None,
        losses: Sequence[Loss],
        levels: Mapping[str, str],
        log_period: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.__dict__["teacher"] = teacher
        # A level that no loss reads would have an adapter without a gradient.
        read = {tap for loss in losses for tap in loss.taps}
        self.levels = {level: other for level, other in levels.items() if level in read}
        self.log_period = log_period
        self.losses = nn.ModuleList(losses)
        self.adapters = nn.ModuleDict()
        if teacher is not None:
            self._fit_to_teacher(teacher)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What ``__init__`` takes, from ``DISTILL``."""
        check_exportable(cfg)
        student = META_ARCH_REGISTRY.get(student_architecture(cfg))(cfg)
        if not cfg.DISTILL.METHODS:
            return {"student": student, "teacher": None, "losses": [], "levels": {}}
        teacher = build_teacher(cfg)
        shapes = student.backbone.output_shape()
        levels = match_levels(cfg.DISTILL.LEVELS, shapes, teacher.output_shape())
        return {
            "student": student,
            "teacher": teacher,
            "losses": build_losses(cfg, levels, shapes),
            "levels": levels,
            "log_period": cfg.DISTILL.LOG_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return cast(torch.device, self.student.device)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Loss terms by name in training, the student's detections in inference.

        Args:
            batched_inputs: as detectron2's data loaders give them.
        """
        if not self.training or self.teacher is None:
            return self.student(batched_inputs)
        # Both models bring the images to the device: moved here, they travel once.
        images = [entry["image"].to(self.device) for entry in batched_inputs]
        batched_inputs = [{**entry, "image": i} for entry, i in zip(batched_inputs, images)]
        with BackboneTap(self.student.get_submodule("backbone")) as tap:
            terms = dict(self.student(batched_inputs))
        logged = self._logs_now()
        own = {level: tap.features[level] for level in self.levels}
        if logged:
            own = {level: _log_gradient(level, feature) for level, feature in own.items()}
        student, teacher = self._pair(own, self.teacher(images, tap.canvas), tap.canvas)
        if logged:
            _log_alignment(student, teacher)
        for loss in self.losses:
            added = loss(student, teacher, None)
            if twice := terms.keys() & added.keys():
                raise ConfigError(f"DISTILL.METHODS: two losses give {', '.join(sorted(twice))}")
            terms.update(added)
        return terms

    def _pair(
        self, own: Mapping[str, Tensor], other: Mapping[str, Tensor], canvas: tuple[int, int]
    ) -> tuple[Outputs, Outputs]:
        """Both models' maps by the student's levels, at one size and width."""
        assert self.teacher is not None  # it gave one of the two
        strides = self.teacher.output_shape()
        student, teacher = {}, {}
        for level, teacher_level in self.levels.items():
            feature = self._adapt(level, own[level])
            stride = strides[teacher_level].stride
            matched = match_map(other[teacher_level], canvas, stride, feature.shape[-2:])
            student[level], teacher[level] = feature, matched.to(feature.dtype)
        return Outputs(features=student), Outputs(features=teacher)

    def _adapt(self, level: str, feature: Tensor) -> Tensor:
        return self.adapters[level](feature) if level in self.adapters else feature

    def _fit_to_teacher(self, teacher: TeacherBackbone) -> None:
        """Size the adapters by a dry run: a 1x1 convolution where the widths differ."""
        backbone = self.student.get_submodule("backbone")
        canvas = (DRY_RUN_SIDE, DRY_RUN_SIDE)
        with torch.no_grad(), evaluation_mode(backbone):
            device = next(backbone.parameters()).device
            own = backbone(torch.zeros(2, 3, *canvas, device=device))
            other = teacher([torch.zeros(3, *canvas)] * 2, canvas)
        for level, teacher_level in self.levels.items():
            widths = own[level].shape[1], other[teacher_level].shape[1]
            if widths[0] != widths[1]:
                self.adapters[level] = nn.Conv2d(*widths, 1).to(device)
        with torch.no_grad():
            pair = self._pair({level: own[level] for level in self.levels}, other, canvas)
        for loss in cast(Iterable[Loss], self.losses):
            loss.prepare(*pair)

    def _logs_now(self) -> bool:
        return self.log_period > 0 and get_event_storage().iter % self.log_period == 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move of a module goes through here: take the teacher along."""
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self


def check_exportable(cfg: CfgNode) -> None:
    """Refuse a student that plain detectron2 could not load.

    Raises:
        ConfigError: its backbone is known to this project alone.
    """
    architecture, backbone = student_architecture(cfg), cfg.MODEL.BACKBONE.NAME
    # FCOS is exported as a LazyConfig, which describes its pyramid without a name.
    if backbone == build_p6p7_resnet_fpn_backbone.__name__ and architecture != "FCOS":
        raise ConfigError(
            f"MODEL.BACKBONE.NAME: plain detectron2 does not know {backbone!r} and could not load "
            f"the student; give a {architecture} one of its own, e.g. "
            "'build_retinanet_resnet_fpn_backbone'"
        )


def _log_gradient(level: str, feature: Tensor) -> Tensor:
    """The map as the losses see it; the norm of what they send back through it is logged."""
    storage = get_event_storage()
    branch = feature.view_as(feature)
    branch.register_hook(
        lambda grad: storage.put_scalar(
            f"distill_grad/{level}", grad.norm().item(), smoothing_hint=False
        )
    )
    return branch


@torch.no_grad()
def _log_alignment(student: Outputs, teacher: Outputs) -> None:
    """Log ``CKA`` between the positions of each level's maps, ``X (B * H * W, C)``."""
    for level, feature in student.features.items():
        pair = (f.float().movedim(1, -1).flatten(0, 2) for f in (feature, teacher.features[level]))
        get_event_storage().put_scalar(f"cka/{level}", cka(*pair).item(), smoothing_hint=False)
