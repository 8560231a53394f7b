"""DOT: separate momenta for the gradients of task and teacher (Zhao et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcka.distributed import average_over_processes

# Per parameter: the running sums of both gradients.
VELOCITIES = ("task", "taught")


class DistillationOriented(torch.optim.Optimizer):
    r"""SGD that remembers the teacher's gradient for longer than the task's.

    ``v_task <- (m - d) v_task + g_task + w p``, ``v_taught <- (m + d) v_taught + g_taught``, ``p <-
    p - lr (v_task + v_taught)``, with momentum ``m``, difference ``d`` and weight decay ``w`` (Zhao
    et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023). A parameter that only one of the two
    gradients reaches (an adapter's, say) has momentum ``m``, as in the authors' public code; with
    ``d = 0`` this is SGD.

    Call :meth:`backward` before each :meth:`step`, instead of the loss's own. It averages both
    gradients over all processes; DistributedDataParallel can only average one.

    Args:
        parameters: the trained parameters, or groups of them, as for torch's optimizers.
        lr: learning rate, a number or a scalar on the parameters' device.
        momentum: ``m``.
        delta: ``d``, at most ``m``; ``m + d`` must be below 1.
        weight_decay: ``w``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        momentum: float,
        delta: float,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= delta <= momentum < 1 - delta:
            raise ValueError(
                "delta: expected 0 to the momentum, and a sum of both below 1, got "
                f"{delta} with a momentum of {momentum}"
            )
        settings = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__(parameters, settings)
        for parameter in self._parameters():
            self.state[parameter] = {name: torch.zeros_like(parameter) for name in VELOCITIES}
        self._taught: dict[nn.Parameter, Tensor | None] = {}

    def backward(self, task: Sequence[Tensor], taught: Sequence[Tensor]) -> None:
        """Compute the gradients of two sums of terms for the next step; the task's accumulates.

        Args:
            task: scalars with a graph that need no teacher; may be empty.
            taught: those that do; may be empty.
        """
        parameters = self._parameters()
        self._taught = {}
        if taught:
            gradients = torch.autograd.grad(
                torch.stack(list(taught)).sum(), parameters, retain_graph=True, allow_unused=True
            )
            self._taught = dict(zip(parameters, gradients, strict=True))
        if task:
            torch.stack(list(task)).sum().backward()
        found = [*(p.grad for p in parameters), *self._taught.values()]
        average_over_processes([gradient for gradient in found if gradient is not None])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: backward() comes before
        """Update every parameter that a gradient reached."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradients = [parameter.grad, self._taught.get(parameter)]
                if any(gradient is not None for gradient in gradients):
                    self._move(parameter, gradients, group)

    def velocities(self) -> list[Tensor]:
        """Return all tensors that :meth:`step` changes besides the parameters."""
        return [self.state[p][name] for p in self._parameters() for name in VELOCITIES]

    def _move(
        self, parameter: nn.Parameter, gradients: Sequence[Tensor | None], group: dict[str, Any]
    ) -> None:
        apart = all(gradient is not None for gradient in gradients)
        delta = group["delta"] if apart else 0.0
        momenta = (group["momentum"] - delta, group["momentum"] + delta)
        decay = group["weight_decay"] * parameter
        for name, gradient, momentum in zip(VELOCITIES, gradients, momenta, strict=True):
            if gradient is not None:
                self.state[parameter][name].mul_(momentum).add_(gradient + decay)
                decay = 0.0  # applied once, with the first gradient
        parameter.sub_(group["lr"] * sum(self.state[parameter][name] for name in VELOCITIES))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]
