"""CTKD: a temperature that is learned against the student (Li et al., AAAI 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcka.losses.adapters import adapt, fit, prepared
from pcka.losses.base import NO_CONTEXT, Context, LogitLoss, Outputs
from pcka.losses.checks import as_logits, check_temperature
from pcka.ops.functional import check_choice

FORMS = ("global", "instance")


def ctkd_loss(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    r"""Divergence of softened probabilities at a learnable temperature.

    ``mean_i T_i^2 KL(softmax(t_i / T_i) || softmax(s_i / T_i))``, with one ``T`` for all samples or
    one for each (Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023).

    Args:
        student: ``(B, P)`` logits, any floating dtype.
        teacher: ``(B, P)`` logits; no gradient reaches it.
        temperature: ``T``, positive, ``()`` or ``(B,)``.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: logits that differ in shape or device, or a temperature of any other shape.
    """
    student, teacher = as_logits(student, teacher)
    if temperature.shape not in (torch.Size([]), student.shape[:1]):
        raise ValueError(
            f"temperature must be one number () or one for each of the {len(student)} samples, got "
            f"{tuple(temperature.shape)}"
        )
    of_each = temperature.to(student.dtype).expand(len(student))[:, None]
    log_student = F.log_softmax(student / of_each, dim=1)
    log_teacher = F.log_softmax(teacher / of_each, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return (of_each.square() * divergence).sum(1).mean()


class _Reversed(torch.autograd.Function):
    """The identity, with the gradient multiplied by ``-factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return -factor.to(grad.dtype) * grad, None


class CTKD(LogitLoss):
    r""":func:`ctkd_loss` with a learned temperature: ``{"loss_ctkd"}``.

    ``T = lowest + span * sigmoid(u)``. In the form ``"global"``, ``u`` is one trained number that
    starts at 1. In the form ``"instance"``, two trained linear layers with a ReLU between them
    compute ``u`` for each sample from the probabilities of both models, which receive no gradient
    from it; it starts at 0.

    ``u`` is trained to maximise the loss that the student minimises: its gradient is reversed and
    multiplied by ``(1 - cos(pi n / curriculum_steps)) / 2`` at the ``n``-th training step, and by 1
    after ``curriculum_steps`` (Li et al. 2023; the values are those of the authors' public code for
    CIFAR, whose curriculum is ten epochs of 781 batches. That code has only the global form).

    Args:
        weight: factor of the term.
        form: ``"global"`` or ``"instance"``.
        lowest: lower bound of the temperature, above 0.
        span: how far the temperature may rise above ``lowest``; above 0.
        curriculum_steps: training steps until the temperature learns at full rate, 1 or more.
        hidden: hidden width of the layers of the form ``"instance"``.
    """

    steps: Tensor

    def __init__(
        self,
        *,
        weight: float = 0.9,
        form: str = "global",
        lowest: float = 1.0,
        span: float = 20.0,
        curriculum_steps: int = 7810,
        hidden: int = 256,
    ) -> None:
        check_temperature(lowest, "lowest")
        check_temperature(span, "span")
        check_choice("form", form, FORMS)
        for name, count in (("curriculum_steps", curriculum_steps), ("hidden", hidden)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer, got {count!r}")
        super().__init__(weight, temperature=lowest)
        self.form = form
        self.lowest = lowest
        self.span = span
        self.curriculum_steps = curriculum_steps
        self.hidden = hidden
        self.of_all = nn.Parameter(torch.ones(())) if form == "global" else None
        self.of_each: nn.Sequential | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the layers of the form ``"instance"``."""
        logits = self.need(student.logits, "student.logits")
        self.to(logits.device)
        if self.form == "instance":
            first, last = nn.Linear(2 * logits.shape[1], self.hidden), nn.Linear(self.hidden, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.of_each = fit(nn.Sequential(first, nn.ReLU(), last), logits)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        student, teacher = as_logits(student, teacher)
        return ctkd_loss(student, teacher, self._temperature(student, teacher))

    def _temperature(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        raw: Tensor | None = self.of_all
        if raw is None:
            both = torch.cat([student.detach().softmax(1), teacher.softmax(1)], dim=1)
            raw = adapt(prepared(self.of_each, "CTKD"), both).squeeze(1)
        done = (self.steps / self.curriculum_steps).clamp(max=1)
        raw = _Reversed.apply(raw.to(student.dtype), (1 - torch.cos(math.pi * done)) / 2)
        return self.lowest + self.span * torch.sigmoid(raw)
