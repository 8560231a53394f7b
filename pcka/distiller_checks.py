"""A distiller's argument checks: its losses, and models that cannot be trained as given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcka.losses.base import Loss


def check_losses(losses: object) -> None:
    """Refuse anything but a list of this library's losses."""
    if not isinstance(losses, Sequence | nn.ModuleList):
        raise ValueError(f"losses must be a list, got {type(losses).__name__}; write [...]")
    for loss in losses:
        if not isinstance(loss, Loss):
            raise ValueError(
                f"losses must be pcka.losses.Loss objects, got {loss!r}; use one of pcka.losses, "
                "such as CE() or KD(), or a subclass with terms()"
            )


def check_scalable(losses: Iterable[Loss], relative_to: str) -> None:
    """Refuse to scale terms to another one if one of them can be negative."""
    signed = [type(loss).__name__ for loss in losses if loss.can_be_negative]
    if relative_to and signed:
        raise ValueError(
            f"relative_to: terms of {', '.join(signed)} can be negative, so that no factor brings "
            f"them to the value of {relative_to!r}; leave it empty, or leave these losses out"
        )


def check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse models that share tensors: one cannot be frozen while the other is trained."""
    if teacher is None:
        return
    kinds: tuple[tuple[str, Callable[[nn.Module], Iterable[Tensor]], str], ...] = (
        ("parameters", nn.Module.parameters, "freezing it would freeze both"),
        ("buffers", nn.Module.buffers, "training the student would change both"),
    )
    for kind, tensors_of, consequence in kinds:
        trained = {id(tensor) for tensor in tensors_of(student)}
        if any(id(tensor) in trained for tensor in tensors_of(teacher)):
            way_out = "pass copy.deepcopy(teacher)"
            raise ValueError(f"teacher shares {kind} with student, and {consequence}; {way_out}")


def check_gradients(student: nn.Module, beside: Iterable[nn.Module]) -> None:
    """Refuse a student in DistributedDataParallel if other modules beside it are trained."""
    if not isinstance(student, DistributedDataParallel):
        return
    if any(parameter.requires_grad for part in beside for parameter in part.parameters()):
        raise ValueError(
            "student: DistributedDataParallel averages only its gradients, but adapters or losses "
            "are trained too; pass student.module, and wrap the distiller instead"
        )
