"""The state that a run resumes from, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.files import CheckpointError, load_file

Kinds = Mapping[str, type | tuple[type, ...]]

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # read without checking that they exist


def load_state(path: Path, parts: Kinds) -> dict:
    """Return the state in a run's checkpoint, which must hold ``parts``, name -> type.

    Raises:
        ConfigError: the file is damaged or not a run's checkpoint; the message names it and what to
            do.
    """
    try:
        state = load_file(path)
    except CheckpointError as error:
        raise refusal(path, str(error)) from error
    if not isinstance(state, dict):
        raise refusal(path, f"it holds a {type(state).__name__}")
    for name, kind in parts.items():
        if name not in state:
            raise refusal(path, f"it has no {name!r}")
        if not isinstance(state[name], kind):
            raise refusal(path, f"its {name!r} is a {type(state[name]).__name__}")
    return state


def with_adapters(state: dict, distiller: Distiller, path: Path) -> dict:
    """Return a state with ``adapters`` outside the losses, moved there if it has them inside.

    ``losses.<i>.adapters.<tap>.0.weight`` becomes ``adapters.<tap>.weight``. The optimizer's state
    is indexed by parameter order, which is preserved only if the losses have no other parameters.

    Raises:
        ConfigError: two losses have adapters for the same tap, or the losses have other parameters;
            the file is named.
    """
    if isinstance(state.get("adapters"), dict):
        return state
    losses, adapters = dict(state["losses"]), {}
    own = [f"{i}.adapters." for i, loss in enumerate(distiller.losses) if loss.same_shape]
    moved = [name for name in losses if name.startswith(tuple(own))]
    for name in moved:
        adapters[name.partition(".adapters.")[2].replace(".0.", ".")] = losses.pop(name)
    if len(adapters) < len(moved) or (moved and losses):
        raise refusal(
            path,
            f"its losses hold feature-map adapters ({moved[0]}), which are now one per tap, "
            "outside the losses",
        )
    return {**state, "losses": losses, "adapters": adapters}


def check_fits(
    state: Mapping, parts: Mapping[str, nn.Module], optimizer: Optimizer, path: Path
) -> None:
    """Refuse tensors whose shapes differ from those that they would replace.

    The fused optimizer reads its state without checking shapes, past the end of a tensor that is
    too small.

    Args:
        state: returned by :func:`load_state`.
        parts: name in the state -> module that will load it.
        optimizer: its state will be loaded too.
        path: of the checkpoint.

    Raises:
        ConfigError: an entry does not fit; the message names the file, the entry and what to do.
    """
    try:
        for part, module in parts.items():
            _check_entries(part, state[part], module.state_dict())
        _check_optimizer(state["optimizer"], optimizer)
    except CheckpointError as error:
        raise refusal(path, f"it does not fit the models: {error}") from error


def _check_optimizer(saved: Mapping, optimizer: Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        entries = {numbers.index(number): entry for number, entry in saved["state"].items()}
        found = {(i, name): value for i, entry in entries.items() for name, value in entry.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(optimizer).__name__
        raise CheckpointError(f"optimizer: its state is not of {kind} ({error!r})") from error
    if len(numbers) != len(parameters):
        raise CheckpointError(f"optimizer: {len(numbers)} parameters, not {len(parameters)}")
    for i, entry in entries.items():
        present = {name for name, value in entry.items() if value is not None}
        if isinstance(optimizer, AdamW) and (lacking := ADAMW_STATE - present):
            raise CheckpointError(f"optimizer: parameter {i} has no {', '.join(sorted(lacking))}")
    for (i, name), value in found.items():
        own = torch.zeros(()) if name == "step" else parameters[i]
        if value is not None and not (
            isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
        ):
            raise CheckpointError(
                f"optimizer: {name} of parameter {i} is {_described(value)}, not {_described(own)}"
            )


def _check_entries(part: str, saved: Mapping, own: Mapping[str, Tensor]) -> None:
    if saved.keys() != own.keys():
        differing = sorted(map(str, saved.keys() ^ own.keys()))[:3]
        raise CheckpointError(f"{part}: entries differ: {', '.join(differing)}")
    for name, value in saved.items():
        if not isinstance(value, Tensor) or value.shape != own[name].shape:
            raise CheckpointError(
                f"{part}: {name} is {_described(value)}, not {_described(own[name])}"
            )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def refusal(path: Path, reason: str) -> ConfigError:
    """The error that says why a run cannot be resumed from a checkpoint, and what to do."""
    return ConfigError(
        f"OUTPUT_DIR: the run in {str(path.parent)!r} cannot be resumed from {path.name}: "
        f"{reason}; restore the file, or choose another OUTPUT_DIR"
    )
