"""Which layers a model has, by what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pcka.modes import evaluation_mode

_TRIED_SAMPLES = 5  # few other sizes within a model are 5


@torch.no_grad()
def find_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Paths of the modules that give a feature of each sample, in the order in which they ran.

    Left out is what runs more than once in a forward pass, what gives no floating tensor
    ``(B, ...)``, and what hands on the output of a module before it (``nn.Identity``, dropout and
    flattening, or an ``nn.Sequential``, whose last module is named instead).

    Args:
        model: runs once in eval mode on the first images, and is left in the mode it was in.
        images: ``(B, ...)``, two or more.
    """
    images = images[:_TRIED_SAMPLES]
    names = {module: name for name, module in model.named_modules() if name}
    calls: Counter[str] = Counter()
    found: dict[tuple[Any, ...], str] = {}
    alive = []  # else another tensor could come to lie where one lay

    def look(module: nn.Module, _: Any, output: Any) -> None:
        calls[names[module]] += 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.dim() > 0 and len(output) == len(images):
            alive.append(output)
            storage = output.untyped_storage().data_ptr()
            place = storage, output.storage_offset(), output.numel(), output._version
            found.setdefault(place, names[module])

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with evaluation_mode(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in found.values() if calls[name] == 1]


def select_layers(
    model: nn.Module, wanted: str | Sequence[str] | None, images: Tensor
) -> list[str]:
    """Paths as they are asked for, patterns replaced by the layers that match them.

    Args:
        model: runs as for :func:`find_layers` where there is a pattern.
        wanted: paths and patterns (``*``, ``?``, ``[...]``); None: all that are found.
        images: ``(B, ...)``, two or more.

    Raises:
        ValueError: a pattern that no layer matches, or no layer at all.
    """
    patterns = ["*"] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: list[str] = []
    found: list[str] | None = None
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            chosen.append(pattern)
            continue
        if found is None:
            found = find_layers(model, images)
        matching = [name for name in found if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"layers: no layer of {type(model).__name__} matches {pattern!r}; there are "
                f"{', '.join(found) or 'none that give a feature of each sample'}"
            )
        chosen += matching
    if not chosen:
        raise ValueError("layers: expected one or more paths or patterns, got none")
    return list(dict.fromkeys(chosen))
