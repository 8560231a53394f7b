"""Reading the intermediate features of a model, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

INPUT_SUFFIX = ":input"


class _Reading(NamedTuple):
    """What a tap path names: the output of a module, or its input."""

    path: str
    side: str

    @classmethod
    def of(cls, path: str) -> _Reading:
        side = "input" if path.endswith(INPUT_SUFFIX) else "output"
        return cls(path.removesuffix(INPUT_SUFFIX), side)


class FeatureTap:
    """Keeps what named modules of a model return, from one forward pass to the next ``pop``.

    ``with FeatureTap(model, {"stage3": "layer3"}) as tap: logits = model(x); f = tap.pop()``

    A path followed by ``:input`` reads what goes into the module instead: ``"layer3.2.relu:input"``
    is the third block of ``layer3`` before its activation.

    A tap holds the output (or input) of exactly one call: a module that runs twice before
    :meth:`pop` (because it is shared within the model, or because the model ran twice) has no
    single output to give, and is an error. Tensors are handed over as they are, in their memory
    format and with their graph.

    Args:
        model: the module to read from.
        paths: tap name -> module path, as in ``model.named_modules()``, for the module's output;
            with ``:input`` behind it for its first positional argument.

    Raises:
        ValueError: a path that the model does not have; the message lists near matches.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        self._readings = {name: _Reading.of(path) for name, path in paths.items()}
        _check_paths(model, self._readings)
        self._features: dict[str, tuple[Tensor, int]] = {}
        self._handles = [self._attach(model, name) for name in paths]

    def pop(self) -> dict[str, Tensor]:
        """The features of the last forward pass by tap name; the tap forgets them.

        Raises:
            RuntimeError: a tapped module did not run, or what it gave was changed in place since.
        """
        features, self._features = self._features, {}
        for name, (path, side) in self._readings.items():
            if name not in features:
                raise RuntimeError(
                    f"tap {name!r}: module {path!r} did not run since the last pop(); run the "
                    "model first, and tap a module that its forward pass calls"
                )
            feature, version = features[name]
            if _version(feature) != version:
                way_out = {
                    "output": "tap the module that changes it (often the activation)",
                    "input": "build what changes it (often the module itself) with inplace=False",
                }[side]
                raise RuntimeError(
                    f"tap {name!r}: the {side} of module {path!r} was changed in place after it "
                    f"was tapped; {way_out}"
                )
        return {name: features[name][0] for name in self._readings}

    def remove(self) -> None:
        """Detach from the model and forget what was kept; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _attach(self, model: nn.Module, name: str) -> RemovableHandle:
        path, side = self._readings[name]
        module = model.get_submodule(path)
        if side == "output":
            return module.register_forward_hook(lambda _module, _inputs, y: self._keep(name, y))
        # Before the module runs, because it may overwrite its input, and then nobody could tell.
        return module.register_forward_pre_hook(
            lambda _module, inputs: self._keep(name, inputs[0] if inputs else None)
        )

    def _keep(self, name: str, feature: object) -> None:
        path, side = self._readings[name]
        if not isinstance(feature, Tensor):
            verb = {"output": "returned", "input": "got as first positional argument"}[side]
            raise ValueError(
                f"tap {name!r}: module {path!r} {verb} {type(feature).__name__}, expected a "
                "tensor; tap a module inside it"
            )
        if name in self._features:
            raise RuntimeError(
                f"tap {name!r}: module {path!r} ran twice since the last pop(); call pop() "
                "after each forward pass, and tap a module that runs once in it"
            )
        self._features[name] = feature, _version(feature)


def _check_paths(model: nn.Module, readings: Mapping[str, _Reading]) -> None:
    known = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name, (path, _) in readings.items():
        if path not in known:
            near = difflib.get_close_matches(path, known, n=5, cutoff=0.4)
            raise ValueError(
                f"tap {name!r}: {type(model).__name__} has no module {path!r}; "
                f"near matches: {', '.join(near) or 'none'}. model.named_modules() lists all paths"
            )


def _version(feature: Tensor) -> int:
    """How often the tensor was written to in place; tensors of inference mode do not count."""
    return 0 if feature.is_inference() else feature._version
