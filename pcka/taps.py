"""A model's outputs on a batch: its logits, and features read inside it, by module path."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from pcka.losses.base import Outputs
from pcka.modes import unchanged

INPUT_SUFFIX = ":input"
MAP_SUFFIX = ":map"
MOST_PREFIX_TOKENS = 16  # most class and register tokens that are recognised as such

LogitsOf = str | Callable[[Any], Tensor | None]


class _Reading(NamedTuple):
    """What a tap path names: the output of a module, a part of it, or the module's input."""

    path: str
    key: str
    is_input: bool
    as_map: bool
    prefix: int | None

    @classmethod
    def of(cls, text: str, model: nn.Module) -> _Reading:
        path, _, key = text.removesuffix(MAP_SUFFIX).partition(":")
        is_input, as_map = f":{key}" == INPUT_SUFFIX, text.endswith(MAP_SUFFIX)
        path = _within_wrappers(model, path)
        return cls(path, key, is_input, as_map, prefix_tokens(model, path))

    @property
    def module(self) -> str:
        return f"module {self.path!r}" if self.path else "the model"

    def pick(self, name: str, inputs: tuple[Any, ...], *output: Any) -> Tensor:
        """The tensor that the tap ``name`` reads from the module's inputs or output."""
        value = output[0] if output else inputs[0] if inputs else None
        if self.key and not self.is_input:
            found = part(value, self.key)
            if found is None:
                raise ValueError(
                    f"tap {name!r}: {self.module} returned {type(value).__name__} without "
                    f"{self.key!r}; available: {part_names(value)}"
                )
            value = found
        if not isinstance(value, Tensor):
            verb = "got as first positional argument" if self.is_input else "returned"
            way_out = "tap a module inside it"
            if not self.is_input and (parts := part_names(value)) != "none":
                way_out += f", or name a part, '{self.path}:KEY' (available: {parts})"
            raise ValueError(
                f"tap {name!r}: {self.module} {verb} {type(value).__name__}, expected a tensor; "
                f"{way_out}"
            )
        if not self.as_map:
            return value
        try:
            return as_map(value, self.prefix)
        except ValueError as error:
            raise ValueError(f"tap {name!r}: {self.module}: {error}") from error


class TapError(RuntimeError):
    """A tapped module did not run, ran twice, or its feature was changed in place."""


class FeatureTap:
    """Keeps the outputs of named modules of a model, from a forward pass to the next ``pop``.

    ``with FeatureTap(model, {"stage3": "layer3"}) as tap: logits = model(x); f = tap.pop()``

    A path followed by ``:KEY`` reads a part of what the module returns: an entry of a dict, an item
    by its index, or an attribute (``"backbone:p3"``, ``"lstm:0"``). A path followed by ``:input``
    reads the module's input instead: ``"layer3.2.relu:input"`` is the output of the third block of
    ``layer3`` before its activation. An empty path is the model itself (``":p3"``). At the end of
    any of these, ``:map`` reads the tokens of a transformer, or a map with its channels last, as a
    map ``(B, C, H, W)`` (:func:`as_map`): ``"blocks.11:map"``.

    If ``torch.compile`` or ``DistributedDataParallel`` wraps the model, the paths may be those of
    the unwrapped model.

    A tap holds the output (or input) of exactly one call: a module that runs twice before
    :meth:`pop` (because it is shared within the model, or because the model ran twice) has no
    single output, and is an error. Tensors are returned as they are, in their memory format and
    with their graph.

    Args:
        model: the module to read from.
        paths: tap name -> module path, as in ``model.named_modules()``, for the module's output;
            followed by ``:KEY`` for a part of it, by ``:input`` for the module's first positional
            argument, and at the end by ``:map`` for a map.
        keep: called on each feature as soon as it is read; its result is kept. None: the feature
            itself.

    Raises:
        ValueError: a path that the model does not have; the message lists near matches.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str],
        *,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._readings = {name: _Reading.of(path, model) for name, path in paths.items()}
        _check_paths(model, self._readings)
        self._kept_of = keep
        self._features: dict[str, tuple[Tensor, int]] = {}
        self._handles = [
            _hook(model, reading, partial(self._keep, name, reading))
            for name, reading in self._readings.items()
        ]

    def _keep(self, name: str, reading: _Reading, _: nn.Module, *given: Any) -> None:
        """Hook; keeps each tensor together with its version."""
        feature = reading.pick(name, *given)
        if name in self._features:
            raise TapError(
                f"tap {name!r}: {reading.module} ran twice since the last pop(); call pop() after "
                "each forward pass, and tap a module that runs once in it"
            )
        if self._kept_of is not None:
            feature = self._kept_of(feature)
        self._features[name] = feature, _version(feature)

    def pop(self) -> dict[str, Tensor]:
        """Return the features of the last forward pass by tap name, and forget them.

        Raises:
            TapError: a tapped module did not run, or its feature was changed in place since.
        """
        features, self._features = self._features, {}
        for name, reading in self._readings.items():
            if name not in features:
                raise TapError(
                    f"tap {name!r}: {reading.module} did not run since the last pop(); run the "
                    "model first, and tap a module that its forward pass calls"
                )
            feature, version = features[name]
            if _version(feature) != version:
                side, way_out = "output", "tap the module that changes it (often the activation)"
                if reading.is_input:
                    side = "input"
                    way_out = "build what changes it (often the module itself) with inplace=False"
                raise TapError(
                    f"tap {name!r}: the {side} of {reading.module} was changed in place; {way_out}"
                )
        return {name: features[name][0] for name in self._readings}

    def remove(self) -> None:
        """Detach from the model and forget all features; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Observer:
    """Runs a model and returns its output and what its taps read, as :class:`Outputs`.

    In eager mode, the taps are on the model only during the call. In compiled mode, they are plain
    hooks that stay on it, because :func:`torch.compile` traces through those; they keep nothing
    when the model is called directly. They cannot see what :class:`FeatureTap` refuses, such as a
    feature that is changed in place, so that the first inputs are also run in eager mode.

    Args:
        model: inputs, such as images ``(B, C, H, W)`` -> an output that :func:`find_logits`
            searches.
        paths: tap name -> path in ``root``, as :class:`FeatureTap` takes them.
        root: the module that the paths start from; ``model`` if None.
        logits_of: as :func:`find_logits` takes it.
        compile: run through :func:`torch.compile`. The first call is slow, and so is the first one
            with another shape or mode.

    Raises:
        ValueError: a path that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str],
        *,
        root: nn.Module | None = None,
        logits_of: LogitsOf | None = None,
        compile: bool = False,
    ) -> None:
        self._model = model
        self._root = model if root is None else root
        self._paths = {name: path or ":" for name, path in paths.items()}
        self._logits_of = logits_of
        FeatureTap(self._root, self._paths).remove()  # refuses unknown paths
        self._compiled: Callable[..., tuple[Any, dict[str, Tensor]]] | None = None
        if compile:
            self._features: dict[str, Tensor] = {}
            self._watching = self._tried = False
            for name, path in self._paths.items():
                reading = _Reading.of(path, self._root)
                _hook(self._root, reading, partial(self._keep, name, reading))
            self._compiled = torch.compile(self._hooked)

    def __call__(self, *inputs: Any) -> Outputs:
        """Return the logits, tapped features and raw output of one forward pass."""
        if self._compiled is None:
            raw, features = self._run(*inputs)
        else:
            if not self._tried:
                with torch.no_grad(), unchanged(self._root):
                    self._run(*inputs)
                self._tried = True
            self._watching = True
            try:
                raw, features = self._compiled(*inputs)
            finally:
                self._watching = False
            if absent := self._paths.keys() - features.keys():
                path = self._paths[min(absent)]
                raise TapError(
                    f"tap {min(absent)!r}: module {path!r} did not run; its model calls it in "
                    f"{'evaluation' if self._root.training else 'training'} mode only"
                )
        return Outputs(find_logits(raw, self._logits_of), features, raw=raw)

    def _run(self, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        with FeatureTap(self._root, self._paths) as tap:
            return self._model(*inputs), tap.pop()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: compiled code belongs to this observer alone."""
        return {**self.__dict__, "_compiled": None, "_compile": self._compiled is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        compile = state.pop("_compile")
        self.__dict__.update(state)
        if compile:
            self._compiled = torch.compile(self._hooked)

    def _keep(self, name: str, reading: _Reading, _: nn.Module, *given: Any) -> None:
        """Hook of the compiled model."""
        if self._watching:
            self._features[name] = reading.pick(name, *given)

    def _hooked(self, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        raw = self._model(*inputs)
        # Reads every path, because torch.compile reuses what it compiled for another observer if
        # everything that it checks is the same, and it does not check hooks.
        features = {
            name: self._features[name]
            for name, path in self._paths.items()
            if path and name in self._features
        }
        self._features.clear()
        return raw, features


def find_logits(output: Any, logits_of: LogitsOf | None = None) -> Tensor | None:
    """Find the logits in a model's output; None if there are none.

    Args:
        output: a tensor, taken as the logits; a mapping or an object, whose entry or attribute
            ``logits`` is taken; or a tuple or list, whose first tensor is.
        logits_of: the name of another entry or attribute, or a function of ``output``.
    """
    if callable(logits_of):
        return logits_of(output)
    if isinstance(output, Tensor):
        return output
    found = part(output, logits_of or "logits")
    if found is None and logits_of is None and isinstance(output, tuple | list):
        found = next((item for item in output if isinstance(item, Tensor)), None)
    return found if isinstance(found, Tensor) else None


def part(value: Any, key: str) -> Any:
    """The entry, item or attribute ``key`` of a module's output; None if it has none."""
    number = int(key) if key.lstrip("-").isdigit() else None
    if isinstance(value, Mapping):
        return value.get(key, value.get(number))
    if isinstance(value, Sequence) and number is not None:
        return value[number] if -len(value) <= number < len(value) else None
    return getattr(value, key, None)


def as_map(feature: Tensor, prefix: int | None = None) -> Tensor:
    """View the tokens of an image, or a map with its channels last, as a map ``(B, C, H, W)``.

    Args:
        feature: tokens ``(B, N, C)`` of a square image, row by row, after any class and register
            tokens; or ``(B, H, W, C)``.
        prefix: number of class and register tokens, which are left out; if None, or if that leaves
            no square: as many as ``N`` exceeds a square by, at most 16.

    Raises:
        ValueError: the tokens form no square, or the feature has another number of dimensions.
    """
    if feature.dim() == 4:
        return feature.permute(0, 3, 1, 2)
    side = token_side(feature.shape[1], prefix) if feature.dim() == 3 else None
    if side is None:
        raise ValueError(
            f"{MAP_SUFFIX} reads tokens (B, N, C) of a square image, or a map (B, H, W, C); got "
            f"{tuple(feature.shape)}"
            + (f" with {prefix} class and register tokens" if prefix else "")
        )
    return feature[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def token_side(tokens: int, prefix: int | None = None) -> int | None:
    """Side of the square that ``tokens`` form without ``prefix`` of them; None if they form none.

    If that leaves no square (a patch embedding has no class token yet), or ``prefix`` is None, the
    excess over a square counts as the prefix.
    """
    side = math.isqrt(max(0, tokens - (prefix or 0)))
    if prefix is not None and side and side * side + prefix == tokens:
        return side
    side = math.isqrt(tokens)
    return side if side and tokens - side * side <= MOST_PREFIX_TOKENS else None


def prefix_tokens(model: nn.Module, path: str) -> int | None:
    """Number of class and register tokens in ``model``, from timm's ``num_prefix_tokens``.

    Args:
        model: has that attribute, or contains a module that has it.
        path: path of a module; the innermost attribute on the way to it counts.
    """
    found, module = getattr(model, "num_prefix_tokens", None), model
    for name in path.split(".") if path else ():
        module = getattr(module, name, module)
        found = getattr(module, "num_prefix_tokens", found)
    return found if isinstance(found, int) else None


def wrapped(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module that ``torch.compile`` or data parallelism wraps; None if neither does."""
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return "module", model.module
    if type(model).__module__.startswith("torch._dynamo"):  # its class has no public name
        return "_orig_mod", model.get_submodule("_orig_mod")
    return None


def _within_wrappers(model: nn.Module, path: str) -> str:
    """Full path in the model, from a path that may leave out the model's wrappers."""
    prefix, inside = "", model
    while path and not _has_module(inside, path):
        found = wrapped(inside)
        if found is None:
            return path
        name, inside = found
        prefix += f"{name}."
    return prefix + path


def _has_module(model: nn.Module, path: str) -> bool:
    found: nn.Module | None = model
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found is not None


def _hook(model: nn.Module, reading: _Reading, keep: Callable[..., None]) -> RemovableHandle:
    module = model.get_submodule(reading.path)
    if reading.is_input:
        # Before the module runs: it may overwrite its input, which could not be detected later.
        return module.register_forward_pre_hook(keep)
    return module.register_forward_hook(keep)


def _check_paths(model: nn.Module, readings: Mapping[str, _Reading]) -> None:
    known = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name, reading in readings.items():
        if reading.path not in known:
            near = difflib.get_close_matches(reading.path, known, n=5, cutoff=0.4)
            raise ValueError(
                f"tap {name!r}: {type(model).__name__} has no module {reading.path!r}; "
                f"near matches: {', '.join(near) or 'none'}. model.named_modules() lists all paths"
            )


def part_names(value: Any) -> str:
    """The names that :func:`part` finds in a value, for messages."""
    if isinstance(value, Mapping):
        names = list(value)
    elif hasattr(value, "_fields"):
        names = list(value._fields)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        names = list(range(len(value)))
    else:
        names = list(getattr(value, "__dict__", ()))
    return ", ".join(map(str, names)) or "none"


def _version(feature: Tensor) -> int:
    """Number of in-place writes to the tensor; inference tensors do not count them."""
    return 0 if feature.is_inference() else feature._version
