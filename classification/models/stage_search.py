"""Search for the stages, pooled features and classifier of a model that does not name them.

A dry run shows what each module returns. A stage ends with the last module of its resolution, in
convolutional networks and in transformers with several resolutions (Swin, PVT, MaxViT). If all
blocks work at one resolution (ViT, mixers), the stages are quarters of the depth.
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
SIDE = 224  # side of the images tried first, pixels; nearly all models accept them
QUARTERS = 4


@dataclass
class _Call:
    """A call of a module, with the calls nested in it.

    Attributes:
        level: resolution of the output, whose side is about the image's divided by ``2^level``;
            None if the output is not a map of more than one pixel.
        reading: suffix of the module's path with which a tap reads the output as a map.
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
        """Whether the output is a tensor that is not modified in place afterwards."""
        return isinstance(self.output, Tensor) and self.output._version == self.version


Ends = dict[int, _Call]


def find_stages(model: nn.Module, side: int = SIDE) -> Classifier:
    """Set the attributes of :class:`Classifier` that a model lacks, and return the model.

    It runs twice, because taps must work in training and in evaluation mode; its buffers and modes
    and the random state are restored. A model that names its stages is not changed. For a stage
    found here, ``stage1`` and ``stage1_preact`` tap the same output.

    Args:
        model: images ``(B, 3, S, S)`` -> logits.
        side: side of the images that it is made for, pixels; tried if it does not accept 224.
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
    """Check that a model accepts images of a size.

    Args:
        model: images ``(B, 3, S, S)`` -> logits.
        side: side of the images, pixels.

    Raises:
        ValueError: it does not; the message ends with the model's own.
    """
    try:
        _run(model, side, training=False)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not take images of {side} pixels: {error}"
        ) from error


def _run(model: nn.Module, side: int, *, training: bool) -> Any:
    """Return the model's output for images of ``side`` pixels; its state does not change."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), _untouched(model, device):
        return model.train(training)(torch.zeros(BATCH, 3, side, side, device=device))


def _dry_run(model: nn.Module, side: int, *, training: bool) -> _Call | None:
    """Return the calls of a run on images of ``side`` pixels; None if the model rejects them."""
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
    except Exception:  # whatever the model objects to
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
    """Record what a module returned: a map, tokens, a channels-last map, or none of these."""
    call.is_tensor = isinstance(output, Tensor)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        call.reading, output = ":0", output[0]
    call.output = output
    if not isinstance(output, Tensor):
        return
    call.version = output._version
    if output.dim() == 3 and next(call.module.parameters(), None) is None:
        return  # reshaped or pooled: positions and channels cannot be told apart
    found = _map_side(output.shape, prefix_tokens(model, call.path))
    if found is not None and found > 1:
        call.level = round(math.log2(side / found))
        is_map = output.dim() == 4 and output.shape[2] == output.shape[3]
        call.reading += "" if is_map else MAP_SUFFIX


def _map_side(shape: Sequence[int], prefix: int | None) -> int | None:
    """Return the side of a square map ``(B, C, S, S)`` or ``(B, S, S, C)``, or of its tokens."""
    if not shape or shape[0] != BATCH:  # windows, for example, are stacked along the batch
        return None
    if len(shape) == 3:
        return token_side(shape[1], prefix)
    if len(shape) != 4:
        return None
    if shape[2] == shape[3]:
        return shape[2]
    return shape[1] if shape[1] == shape[2] else None


def _once(root: _Call) -> set[str]:
    """Return the taps of modules that run exactly once; no others can be tapped."""
    calls = list(_all_calls(root))
    counts = Counter(call.path for call in calls)
    return {call.tap for call in calls if counts[call.path] == 1}


def _stages(root: _Call, once: set[str]) -> tuple[str, ...]:
    """Return the tap paths of the stages, stem first."""
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
    # A first stage of convolutions that halve the side is itself the stem; others follow a stem.
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
    """Visit the calls nested in one, starting at the resolution of its input.

    A module is taken as a whole, unless it passes through several resolutions (``features``), or
    holds a stage's blocks followed by the change to the next resolution.

    Args:
        call: its nested calls are visited in order.
        level: level of the input map.
        ends: level -> the last call so far that returns a map of it; updated in place.
        firsts: level -> the first such call; updated in place.
        once: the taps that can be used.

    Returns:
        The level of the last map.
    """
    for inner in call.within:
        if isinstance(inner.module, nn.Linear):  # per-position scores, in some heads
            continue
        if inner.level is None:
            if inner.is_tensor:
                found: Ends = {}  # a head: its maps count only at levels that have no other
                _follow(inner, level, found, firsts, once)
                for key in found.keys() - ends.keys():
                    ends[key] = found[key]
            else:
                level = _follow(inner, level, ends, firsts, once)
            continue
        if inner.level < level:  # a side branch: attention weights, or an upsampled map
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
    """Whether a call replaces an earlier end; a mere norm or activation after blocks does not."""
    has_weights = any(parameter.dim() > 1 for parameter in call.module.parameters())
    return has_weights or not any(True for _ in end.module.children())


def _blocks(calls: Sequence[_Call], level: int, once: set[str]) -> list[_Call]:
    """Return the repeated blocks at a network's only resolution: outermost modules of one class."""
    groups: dict[tuple[str, type[nn.Module]], list[_Call]] = {}
    for call in calls:
        if call.level == level and call.tap in once and call.holds and _is_block(call.module):
            key = call.path.rpartition(".")[0], type(call.module)
            groups.setdefault(key, []).append(call)
    repeated = [group for group in groups.values() if len(group) > 1]
    return min(repeated, key=lambda group: (group[0].path.count("."), -len(group)), default=[])


def _is_block(module: nn.Module) -> bool:
    """Whether a module has at least two linear or convolutional layers."""
    return sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in module.modules()) > 1


def _head(root: _Call, once: set[str]) -> tuple[str, str]:
    """Return the paths of the linear layer giving the logits and of its input, before dropout."""
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
    """Return the first of the dropouts right before a call, which change its input in training."""
    for before in reversed(earlier):
        if isinstance(before.module, nn.Dropout) and before.output is call.inputs[0]:
            before.module.inplace = False
            call = before
    return call
