"""Reading the intermediate features of a model, by module path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import TracebackType

from torch import Tensor, nn


class FeatureTap:
    """Keeps what named modules of a model return, from one forward pass to the next ``pop``.

    ``with FeatureTap(model, {"stage3": "layer3"}) as tap: logits = model(x); f = tap.pop()``

    A tap holds the output of exactly one call: a module that runs twice before :meth:`pop`
    (because it is shared within the model, or because the model ran twice) has no single output
    to give, and is an error. Tensors are handed over as they are, in their memory format and with
    their graph.

    Args:
        model: the module to read from.
        paths: tap name -> module path, as in ``model.named_modules()``.

    Raises:
        ValueError: a path that the model does not have; the message lists near matches.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str]) -> None:
        _check_paths(model, paths)
        self._paths = dict(paths)
        self._features: dict[str, tuple[Tensor, int]] = {}
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._keeper(name))
            for name, path in paths.items()
        ]

    def pop(self) -> dict[str, Tensor]:
        """The features of the last forward pass by tap name; the tap forgets them.

        Raises:
            RuntimeError: a tapped module did not run, or its output was changed in place since.
        """
        features, self._features = self._features, {}
        for name, path in self._paths.items():
            if name not in features:
                raise RuntimeError(
                    f"tap {name!r}: module {path!r} did not run since the last pop(); run the "
                    "model first, and tap a module that its forward pass calls"
                )
            feature, version = features[name]
            if _version(feature) != version:
                raise RuntimeError(
                    f"tap {name!r}: the output of module {path!r} was changed in place after it "
                    "was tapped; tap the module that changes it (often the activation)"
                )
        return {name: features[name][0] for name in self._paths}

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

    def _keeper(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            path = self._paths[name]
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"tap {name!r}: module {path!r} returned {type(output).__name__}, expected a "
                    "tensor; tap a module inside it"
                )
            if name in self._features:
                raise RuntimeError(
                    f"tap {name!r}: module {path!r} ran twice since the last pop(); call pop() "
                    "after each forward pass, and tap a module that runs once in it"
                )
            self._features[name] = output, _version(output)

        return keep


def _check_paths(model: nn.Module, paths: Mapping[str, str]) -> None:
    known = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name, path in paths.items():
        if path not in known:
            near = difflib.get_close_matches(path, known, n=5, cutoff=0.4)
            raise ValueError(
                f"tap {name!r}: {type(model).__name__} has no module {path!r}; "
                f"near matches: {', '.join(near) or 'none'}. model.named_modules() lists all paths"
            )


def _version(feature: Tensor) -> int:
    """How often the tensor was written to in place; tensors of inference mode do not count."""
    return 0 if feature.is_inference() else feature._version
