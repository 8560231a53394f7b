"""Find the layers of a model by running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pcka.modes import evaluation_mode

_LISTED = 8  # layers in a message
_TRIED_SAMPLES = 5  # few other sizes in a model are 5


def find_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Paths of the modules that return one feature per sample, in execution order.

    Left out are modules that run more than once in a forward pass, that return no floating tensor
    ``(B, ...)``, or that pass on the output of an earlier module (``nn.Identity``, dropout and
    flattening, or an ``nn.Sequential``, whose last module is listed instead).

    Args:
        model: runs once in eval mode on the first images; its mode is restored.
        images: ``(B, ...)``, two or more.
    """
    return [name for name, is_new in _features(model, images).items() if is_new]


def select_layers(
    model: nn.Module, wanted: str | Sequence[str] | None, images: Tensor
) -> list[str]:
    """The requested paths, with patterns replaced by the modules that match them.

    Args:
        model: runs as for :func:`find_layers` if there is a pattern or ``wanted`` is None.
        wanted: paths and patterns (``*``, ``?``, ``[...]``), which also match modules that pass on
            another's output; None: what :func:`find_layers` finds.
        images: ``(B, ...)``, two or more.

    Raises:
        ValueError: no module matches a pattern, or there is no layer at all.
    """
    if wanted is None:
        wanted = find_layers(model, images)
    patterns = [wanted] if isinstance(wanted, str) else wanted
    found: list[str] | None = None
    chosen: list[str] = []
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            chosen.append(pattern)
            continue
        if found is None:
            found = list(_features(model, images))
        matching = [name for name in found if fnmatchcase(name, pattern)]
        if not matching:
            listed = [*found[:_LISTED], "..."] if len(found) > _LISTED else found
            raise ValueError(
                f"layers: no layer of {type(model).__name__} matches {pattern!r}; available: "
                f"{', '.join(listed) or 'none with one feature per sample'}"
            )
        chosen += matching
    if not chosen:
        raise ValueError(
            f"layers: none requested, or {type(model).__name__} has none "
            "with one feature per sample"
        )
    return list(dict.fromkeys(chosen))


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> dict[str, bool]:
    """Modules that run once and return a feature per sample -> whether no other returned it before.

    In execution order; a module comes after those inside it.
    """
    images = images[:_TRIED_SAMPLES]
    names = {module: name for name, module in model.named_modules() if name}
    calls: Counter[str] = Counter()
    is_new: dict[str, bool] = {}
    given: dict[tuple[Any, ...], Tensor] = {}  # kept, else another could reuse its memory

    def look(module: nn.Module, _: Any, output: Any) -> None:
        name = names[module]
        calls[name] += 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.dim() > 0 and len(output) == len(images):
            storage = output.untyped_storage().data_ptr()
            place = storage, output.storage_offset(), output.numel(), output._version
            is_new[name] = place not in given
            given[place] = output

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with evaluation_mode(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: new for name, new in is_new.items() if calls[name] == 1}
