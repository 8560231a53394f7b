"""Weights in files: save a bare student, load any known layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from pcka.distiller import Distiller
from pcka.extras import optional_package
from pcka.files import (
    CONTAINERS,
    SAFETENSORS,
    CheckpointError,
    atomic_save,
    atomic_write,
    load_file,
)
from pcka.taps import wrapped

ROLES = ("student", "teacher")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile prefix every name with these
_COUNTER = "num_batches_tracked"  # of batch norm; files older than torch 0.4.1 lack it
_NAMES_SHOWN = 10
Shape = tuple[int, ...]
BARE = "bare *"  # layout of a file that is itself the state dict
# DenseNet's published files have names that torchvision itself renames when it loads them.
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class ShapeMismatch(NamedTuple):
    """An entry whose shape differs between file and model."""

    name: str
    in_file: Shape
    in_model: Shape

    def __str__(self) -> str:
        return f"{self.name} {self.in_file} for {self.in_model}"


@dataclass(frozen=True)
class LoadReport:
    """How the entries of a file matched a model's parameters and buffers.

    Args:
        loaded: names loaded from the file.
        missing: names in the model but not in the file.
        unexpected: names in the file but not in the model.
        mismatched: names in both whose shapes differ.
        layout: where the weights were in the file, e.g. ``['state_dict'] module.*`` or
            :data:`BARE`.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[ShapeMismatch, ...]
    layout: str

    @property
    def complete(self) -> bool:
        """Whether file and model match entry for entry."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.loaded)} of {total} entries fit"]
        if self.layout != BARE:
            lines[0] += f", taken from {self.layout}"
        for title in ("missing", "unexpected", "mismatched"):
            if entries := getattr(self, title):
                lines.append(f"  {len(entries)} {title}: {_abridge(entries)}")
        return "\n".join(lines)


def save_student(
    model: nn.Module, path: str | Path, about: Mapping[str, str] | None = None
) -> None:
    """Save only a model's weights, on the CPU, under the names of the unwrapped model.

    Args:
        model: the student, possibly wrapped by DataParallel or ``torch.compile``, or a
            ``Distiller`` (its student is saved).
        path: file to write, atomically: safetensors if it has that suffix, else ``torch.save``.
        about: metadata of a safetensors file.

    Raises:
        CheckpointError: the model's state dict holds something other than tensors.
        ImportError: ``path`` is a ``.safetensors`` file and that package is not installed.
    """
    state = _plain(model).state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"model: a weights file holds only tensors, but {_abridge(others)} is something "
            "else; save the whole state with atomic_save(model.state_dict(), path)"
        )
    # Copies, because torch.save writes a view's whole storage; contiguous, because safetensors
    # requires it.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    if Path(path).suffix == SAFETENSORS:
        content = optional_package("safetensors.torch").save(copies, metadata=about)
        atomic_write(lambda file: file.write(content), path)
    else:
        atomic_save(copies, path)


def _plain(model: nn.Module) -> nn.Module:
    """Return the model, or a distiller's student, without any wrappers."""
    while True:
        if isinstance(model, Distiller):
            model = model.student
        elif inner := wrapped(model):
            model = inner[1]
        else:
            return model


def extract_state_dict(
    obj: object, role: str = "student", own: Collection[str] = ()
) -> dict[str, Tensor]:
    """Extract the weights from a loaded checkpoint, under the model's own names.

    Supported: a bare state dict; one under ``'model'``, ``'state_dict'``, ``'model_state_dict'`` or
    the role's name; names prefixed with ``module.`` or ``_orig_mod.``; student and teacher side by
    side, prefixed with ``student.`` and ``teacher.`` (possibly after ``module.``).

    Args:
        obj: as returned by :func:`load_file`.
        role: "student" or "teacher": which to take if there are both.
        own: names in the model's state dict, if known. A prefix that is part of these names, such
            as that of a submodule called ``module``, is kept.

    Returns:
        Name -> tensor, in the order of the file.

    Raises:
        CheckpointError: there are no weights, or none for that role.
        ValueError: the role is unknown.
    """
    return _unwrap(obj, role, own)[0]


def load_weights(
    model: nn.Module, path: str | Path, *, role: str = "student", allow_partial: bool = False
) -> LoadReport:
    """Load a checkpoint file into a model, by default completely or not at all.

    Batch norm's ``num_batches_tracked`` may be missing, as it is in old files.

    Args:
        model: its parameters and buffers are overwritten in place; device and dtype are kept.
        path: a file in a layout that :func:`extract_state_dict` knows.
        role: "student" or "teacher": which to take if there are both.
        allow_partial: load the entries that fit; the report lists the others.

    Returns:
        What was loaded and what was not; ``str()`` makes it readable.

    Raises:
        CheckpointError: an entry is missing, unexpected or of another shape (unless
            ``allow_partial``), nothing fits at all, or an entry has invalid values (see
            :func:`check_values`). The model is left unchanged.
    """
    obj = load_file(path)
    model = _plain(model)
    own = model.state_dict()
    try:
        state, layout = _unwrap(obj, role, own)
        state = {_name_in(own, name): value for name, value in state.items()}
        expected = {n: t for n, t in own.items() if n in state or n.rpartition(".")[2] != _COUNTER}
        report = compare_shapes(_shapes(state), _shapes(expected), layout)
        if not report.loaded or not (report.complete or allow_partial):
            way_out = (
                "allow_partial=True loads what fits" if report.loaded else "from another model"
            )
            raise CheckpointError(
                f"does not fit {type(model).__name__} ({way_out}): {report}\n"
                "The model is unchanged."
            )
        fitting = {name: state[name] for name in report.loaded}
        check_values(fitting, own)
    except CheckpointError as error:
        raise CheckpointError(f"path: {str(path)!r}: {error}") from error
    model.load_state_dict(fitting, strict=False)
    return report


def check_values(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights that would load without error but only produce garbage.

    A floating-point entry of the model requires floating-point values that are finite in its dtype
    (unless its own are not: masks hold infinities), and variances must not be negative. No entry
    accepts complex values for real ones, or a sparse, quantized or meta tensor.

    Args:
        state: name -> tensor, as read from a file.
        own: name -> tensor, of the model; names missing from either are ignored.

    Raises:
        CheckpointError: the message names the entries.
    """
    faults = {name: _fault(name, value, own[name]) for name, value in state.items() if name in own}
    if found := [f"{name} {fault}" for name, fault in faults.items() if fault]:
        raise CheckpointError(
            f"{len(found)} of {len(faults)} entries hold no weights: {_abridge(found)}; get a "
            "file from a run that did not diverge, with floating-point weights"
        )


def _fault(name: str, value: Tensor, own: Tensor) -> str:
    """Return what is wrong with an entry's value, or an empty string."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else value.layout
        return f"is an unsupported tensor ({kind})"
    if value.is_complex() and not own.is_complex():
        return f"is {value.dtype}"
    if not own.is_floating_point():
        return ""
    if not value.is_floating_point():
        return f"is {value.dtype}"
    if not value.to(own.dtype).isfinite().all() and own.isfinite().all():
        return f"has NaN or infinite values in {own.dtype}"
    if name.rpartition(".")[2] == "running_var" and (value < 0).any():
        return "has negative variances"
    return ""


def _name_in(own: Mapping[str, Tensor], name: str) -> str:
    renamed = _DENSE_LAYER.sub(r"\1\2", name)
    return renamed if name not in own and renamed in own else name


def compare_shapes(given: Mapping[str, Shape], own: Mapping[str, Shape], layout: str) -> LoadReport:
    """Compare the entries of a file with those of a model, by name and shape.

    Args:
        given: name -> shape, of the file.
        own: name -> shape, of the model.
        layout: for the report.
    """
    shared = [name for name in own if name in given]
    return LoadReport(
        loaded=tuple(name for name in shared if given[name] == own[name]),
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mismatched=tuple(
            ShapeMismatch(name, given[name], own[name])
            for name in shared
            if given[name] != own[name]
        ),
        layout=layout,
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _unwrap(obj: object, role: str, own: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Return the weights and the layout that they were found in.

    As soon as any name is one of ``own``, the model's, all prefixes that are left belong to it.
    """
    if role not in ROLES:
        raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {role!r}")
    state, container = _find_container(obj, role)
    state, outer = _strip_wrappers(state, own)
    roles = [known for known in ROLES if any(name.startswith(f"{known}.") for name in state)]
    prefix = inner = ""
    if roles and state.keys().isdisjoint(own):
        prefix = f"{role}."
        if role not in roles:
            raise CheckpointError(f"role: the file holds only {', '.join(roles)}, got {role!r}")
        chosen = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        state, inner = _strip_wrappers(chosen, own)
    return state, f"{container} {outer}{prefix}{inner}*"


def _find_container(obj: object, role: str) -> tuple[dict[str, Tensor], str]:
    if _is_state_dict(obj):
        return obj, "bare"
    keys = (*CONTAINERS, role)
    if isinstance(obj, Mapping):
        for key in keys:
            if _is_state_dict(obj.get(key)):
                return obj[key], f"[{key!r}]"
        found = f"a dict of {_abridge([f'{k!r}: {type(v).__name__}' for k, v in obj.items()])}"
    else:
        found = type(obj).__name__
    raise CheckpointError(
        f"expected a dict of named tensors, bare or under {', '.join(map(repr, keys))}; got {found}"
    )


def _is_state_dict(obj: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(obj, Mapping)
        and len(obj) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in obj.items())
    )


def _strip_wrappers(
    state: dict[str, Tensor], own: Collection[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the state without the prefixes that wrappers add to every name, and the prefixes."""
    stripped = ""
    while state.keys().isdisjoint(own) and (
        prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in state)), "")
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        stripped += prefix
    return state, stripped


def _abridge(entries: Sequence[object]) -> str:
    more = len(entries) - _NAMES_SHOWN
    shown = ", ".join(str(entry) for entry in entries[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
