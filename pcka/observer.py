"""A model together with the taps on it: images in, logits and features out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcka.losses.outputs import Outputs
from pcka.taps import INPUT_SUFFIX, FeatureTap


class Observer:
    """Runs a model and gives what it returns and what its taps read, as :class:`Outputs`.

    Eager, the taps are on the model during the call alone. Compiled, they are plain hooks that
    stay on it, because :func:`torch.compile` traces through those; they keep nothing when the
    model is called otherwise.

    Args:
        model: images ``(B, C, H, W)`` -> logits ``(B, P)``.
        paths: tap name -> module path in ``root``.
        root: the module that the paths start from; ``model`` where None.
        compile: run through :func:`torch.compile`. The first call takes long, and so does the
            first one of another shape or mode.

    Raises:
        ValueError: a path that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str],
        *,
        root: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        self._model = model
        self._root = model if root is None else root
        self._paths = dict(paths)
        FeatureTap(self._root, self._paths).remove()  # refuses unknown paths
        self._compiled: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] | None = None
        if compile:
            self._features: dict[str, Tensor] = {}
            self._watching = False
            for name, path in self._paths.items():
                self._hook(name, path)
            self._compiled = torch.compile(self._hooked)

    def __call__(self, images: Tensor) -> Outputs:
        """Logits and tapped features of one forward pass on ``images (B, C, H, W)``."""
        return self._tapped(images) if self._compiled is None else self._watched(images)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: compiled code belongs to this very observer."""
        return {**self.__dict__, "_compiled": None, "_compile": self._compiled is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        compile = state.pop("_compile")
        self.__dict__.update(state)
        if compile:
            self._compiled = torch.compile(self._hooked)

    def _tapped(self, images: Tensor) -> Outputs:
        with FeatureTap(self._root, self._paths) as tap:
            logits = self._model(images)
            return Outputs(logits, tap.pop())

    def _watched(self, images: Tensor) -> Outputs:
        assert self._compiled is not None
        self._watching = True
        try:
            return Outputs(*self._compiled(images))
        finally:
            self._watching = False

    def _hooked(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._model(images)
        # Looks at every path, because what was compiled for another observer is used again for
        # this one where all that it looked at is the same, and hooks are not looked at.
        features = {name: self._features[name] for name, path in self._paths.items() if path}
        self._features.clear()
        return logits, features

    def _hook(self, name: str, path: str) -> None:
        module = self._root.get_submodule(path.removesuffix(INPUT_SUFFIX))
        if path.endswith(INPUT_SUFFIX):
            module.register_forward_pre_hook(_KeepInput(self, name))
        else:
            module.register_forward_hook(_KeepOutput(self, name))


class _Keep:
    """A hook as an object, so that a copied model's hook keeps for the copied observer."""

    def __init__(self, observer: Observer, name: str) -> None:
        self.observer = observer
        self.name = name

    def keep(self, feature: Any) -> None:
        if self.observer._watching:
            self.observer._features[self.name] = feature


class _KeepInput(_Keep):
    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.keep(inputs[0])


class _KeepOutput(_Keep):
    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.keep(output)
