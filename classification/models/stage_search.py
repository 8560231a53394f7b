"""The stages, the pooled features and the classifier of a model that does not name its own.

One dry run says which module gives what. A convolutional network's stages end with the last module
of each resolution, and so do those of transformers that have several (Swin, PVT, MaxViT). Where
all blocks work at one resolution (ViT, mixers), the stages are quarters of its depth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from classification.models.registry import Classifier
from pcka.taps import INPUT_SUFFIX, MAP_SUFFIX, prefix_tokens, token_side

BATCH = 2  # for batch norms in training mode
SIDE = 224  # pixels of the images that models are tried on first; nearly all take them
QUARTERS = 4


@dataclass
class _Call:
    """One call of a module, with the calls within it.

    Attributes:
        level: of its output's resolution, whose side is about the image's over ``2^level``; None
            where that is no map of more than a pixel.
        reading: what a tap path needs behind the module's path to read it as a map.
    """

    path: str
    module: nn.Module
    within: list[_Call] = field(default_factory=list)
    inputs: tuple[Any, ...] = ()
    output: Any = None
    version: int = 0
    level: int | None = None
    reading: str = ""
    is_tensor: bool = True

    @property
    def tap(self) -> str:
        return self.path + self.reading

    @property
    def holds(self) -> bool:
        """What a tap reads here stays what it is."""
        return isinstance(self.output, Tensor) and self.output._version == self.version


Ends = dict[int, _Call]


def find_stages(model: nn.Module, side: int = SIDE) -> Classifier:
    """Give a model the attributes of :class:`Classifier` that it lacks, and return it.

    It runs twice, because taps must hold in training and in evaluation mode; its buffers, its modes
    and the random numbers stay as they are. A model that names its stages is left alone. A stage
    that is found is tapped as it is, as ``stage1`` and as ``stage1_preact``.

    Args:
        model: images ``(B, 3, S, S)`` -> logits.
        side: pixels of the images that it is made for, tried where it does not take 224.
    """
    classifier = cast(Classifier, model)
    if classifier.stage_names:
        return classifier
    for pixels in dict.fromkeys((SIDE, side)):
        runs = [_dry_run(model, pixels, training=training) for training in (True, False)]
        if runs[0] is None or runs[1] is None:
            continue
        once = _once(runs[0]) & _once(runs[1])
        classifier.stage_names = classifier.preactivation_names = _stages(runs[0], once)
        classifier.preactivation_norms = ("",) * len(classifier.stage_names)
        if not classifier.pooled_name:
            classifier.classifier_name, classifier.pooled_name = _head(runs[0], once)
        break
    return classifier


def check_size(model: nn.Module, side: int) -> None:
    """Refuse images of a size that a model does not take.

    Args:
        model: images ``(B, 3, S, S)`` -> logits.
        side: pixels of the images.

    Raises:
        ValueError: the message ends with the model's own.
    """
    try:
        _run(model, side, training=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not take images of {side} pixels: {error}"
        ) from error


def _run(model: nn.Module, side: int, *, training: bool) -> Any:
    """What the model returns for images of ``side`` pixels; it stays as it is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), _untouched(model, device):
        return model.train(training)(torch.zeros(BATCH, 3, side, side, device=device))


def _dry_run(model: nn.Module, side: int, *, training: bool) -> _Call | None:
    """The calls of a run on images of ``side`` pixels; None where the model does not take them."""
    open_calls = [root := _Call("", model)]
    paths = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        call = _Call(paths[module], module, inputs=inputs)
        open_calls[-1].within.append(call)
        open_calls.append(call)

    def leave(module: nn.Module, inputs: object, output: Any) -> None:
        _describe(open_calls.pop(), output, side, model)

    modules = [module for module in model.modules() if module is not model]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        root.output = _run(model, side, training=training)
    except Exception:  # whatever it is that the model does not take
        return None
    finally:
        for handle in handles:
            handle.remove()
    return root


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)


def _describe(call: _Call, output: Any, side: int, model: nn.Module) -> None:
    """Write down what a module gave: a map, tokens, a map with its channels last, or none."""
    call.is_tensor = isinstance(output, Tensor)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        call.reading, output = ":0", output[0]
    call.output = output
    if not isinstance(output, Tensor):
        return
    call.version = output._version
    if output.dim() == 3 and next(call.module.parameters(), None) is None:
        return  # laid out anew, or pooled: who can tell positions from channels
    found = _map_side(output.shape, prefix_tokens(model, call.path))
    if found is not None and found > 1:
        call.level = round(math.log2(side / found))
        is_map = output.dim() == 4 and output.shape[2] == output.shape[3]
        call.reading += "" if is_map else MAP_SUFFIX


def _map_side(shape: Sequence[int], prefix: int | None) -> int | None:
    """The side of a square map ``(B, C, S, S)`` or ``(B, S, S, C)``, or of tokens of one."""
    if not shape or shape[0] != BATCH:  # windows, for one, are laid along the batch
        return None
    if len(shape) == 3:
        return token_side(shape[1], prefix)
    if len(shape) != 4:
        return None
    if shape[2] == shape[3]:
        return shape[2]
    return shape[1] if shape[1] == shape[2] else None


def _once(root: _Call) -> set[str]:
    """The taps of modules that run once, which alone can be tapped."""
    calls = list(_all_calls(root))
    counts = Counter(call.path for call in calls)
    return {call.tap for call in calls if counts[call.path] == 1}


def _stages(root: _Call, once: set[str]) -> tuple[str, ...]:
    """The paths of the stages, the stem first."""
    calls = list(_all_calls(root))
    ends: Ends = {}
    firsts: Ends = {}
    _follow(root, 0, ends, firsts, once)
    if not ends:
        return ()
    levels = sorted(ends)
    stem = firsts[levels[0]]
    taps = [ends[level].tap for level in levels]
    if len(levels) == 1 and (blocks := _blocks(calls, levels[0], once)):
        parts = [math.ceil(len(blocks) * (k + 1) / QUARTERS) - 1 for k in range(QUARTERS)]
        taps = [blocks[index].tap for index in dict.fromkeys(parts)]
    # Convolutions that halve the side are a stem by themselves; other first stages come after one.
    is_ahead = levels[0] != 1 or MAP_SUFFIX in stem.reading
    holds_first = taps[0] == stem.tap or taps[0].startswith(f"{stem.path}.")
    if is_ahead and not holds_first:
        taps.insert(0, stem.tap)
    return tuple(taps)


def _all_calls(call: _Call) -> Iterator[_Call]:
    for inner in call.within:
        yield inner
        yield from _all_calls(inner)


def _follow(call: _Call, level: int, ends: Ends, firsts: Ends, once: set[str]) -> int:
    """Go through the calls within one, from the resolution that they start at.

    A module is taken as a whole, unless it goes through several resolutions (``features``), or
    holds a stage's blocks and the change to the next resolution after them.

    Args:
        call: whose inner calls are looked at, in their order.
        level: of the map that goes in.
        ends: level -> the last call so far that gives a map of it; added to.
        firsts: level -> the first one; added to.
        once: what can be tapped.

    Returns:
        The level of the last map.
    """
    for inner in call.within:
        if isinstance(inner.module, nn.Linear):  # scores of each position, in some heads
            continue
        if inner.level is None:
            if inner.is_tensor:
                found: Ends = {}  # a head: what comes by the way in it counts where nothing else is
                _follow(inner, level, found, firsts, once)
                for key in found.keys() - ends.keys():
                    ends[key] = found[key]
            else:
                level = _follow(inner, level, ends, firsts, once)
            continue
        if inner.level < level:  # off the way: attention weights, or what is enlarged again
            continue
        if _is_to_open(inner, level):
            _follow(inner, level, ends, firsts, once)
        level = inner.level
        if inner.holds and inner.tap in once:
            firsts.setdefault(level, inner)
            if level not in ends or _goes_on(inner, ends[level]):
                ends[level] = inner
    return level


def _is_to_open(call: _Call, level: int) -> bool:
    assert call.level is not None
    between = range(level + 1, call.level)
    if any(inner.level in between for inner in _all_calls(call)):
        return True
    if call.level == level:
        return False
    kinds = Counter(
        type(inner.module)
        for inner in call.within
        if inner.level == level and _is_block(inner.module)
    )
    return max(kinds.values(), default=0) > 1


def _goes_on(call: _Call, end: _Call) -> bool:
    """Whether a call takes the place of an earlier end: no mere norm or activation after blocks."""
    has_weights = any(parameter.dim() > 1 for parameter in call.module.parameters())
    return has_weights or not any(True for _ in end.module.children())


def _blocks(calls: Sequence[_Call], level: int, once: set[str]) -> list[_Call]:
    """The repeated blocks of a network of one resolution: the outermost modules of one class."""
    groups: dict[tuple[str, type[nn.Module]], list[_Call]] = {}
    for call in calls:
        if call.level == level and call.tap in once and call.holds and _is_block(call.module):
            key = call.path.rpartition(".")[0], type(call.module)
            groups.setdefault(key, []).append(call)
    repeated = [group for group in groups.values() if len(group) > 1]
    return min(repeated, key=lambda group: (group[0].path.count("."), -len(group)), default=[])


def _is_block(module: nn.Module) -> bool:
    """Whether a module has two layers with weights, or more."""
    return sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in module.modules()) > 1


def _head(root: _Call, once: set[str]) -> tuple[str, str]:
    """The linear layer that gives the logits, and what goes into it or a dropout before it."""
    calls = list(_all_calls(root))
    for index, call in reversed(list(enumerate(calls))):
        if (
            isinstance(call.module, nn.Linear)
            and call.tap in once
            and isinstance(root.output, Tensor)
            and call.output is root.output
            and call.inputs
            and isinstance(call.inputs[0], Tensor)
            and call.inputs[0].dim() == 2
        ):
            return call.path, _before_dropouts(call, calls[:index]).path + INPUT_SUFFIX
    return "", ""


def _before_dropouts(call: _Call, earlier: Sequence[_Call]) -> _Call:
    """The first of the dropouts that lead to a call, which in training would change its input."""
    for before in reversed(earlier):
        if isinstance(before.module, nn.Dropout) and before.output is call.inputs[0]:
            before.module.inplace = False
            call = before
    return call
