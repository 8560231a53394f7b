"""Fixed-shape work, recorded once as a CUDA graph and replayed: no launch waits for Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from pcka.engine.config import ConfigError

logger = logging.getLogger("pcka")

WARM_UP = 3  # calls before recording, while libraries choose algorithms and caches fill


class RecordingError(RuntimeError):
    """A function could not be recorded; the tensors that it changes were restored.

    Attributes:
        draws_are_lost: the function draws random numbers, and the device's generator cannot be
            recovered in this process.
    """

    def __init__(self, reason: str, *, draws_are_lost: bool) -> None:
        super().__init__(reason)
        self.draws_are_lost = draws_are_lost


class CapturedFunction:
    """A function on the current CUDA device, recorded as one graph.

    What it does must depend neither on tensor values nor on anything but its inputs and the tensors
    that it reads: Python runs only during recording. It must not wait for the device.

    Args:
        function: called with ``inputs``; returns tensors, possibly nested in tuples, lists,
            mappings and dataclasses.
        inputs: nested likewise, on the device, with the shapes of all later calls.
        changed: the tensors that the function changes in place; warm-up calls leave no trace in
            them.
        beside: an earlier recording that shares its memory with this one: neither may run, nor may
            its outputs be read, while the other runs.

    Attributes:
        draws: whether the function draws from the device's default random generator.

    Raises:
        RecordingError: the function waits for the device, or there is not enough memory.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        inputs: Any,
        changed: Iterable[Tensor],
        beside: CapturedFunction | None = None,
    ) -> None:
        changed = list(changed)
        pool = None if beside is None else beside._graph.pool()
        # Without an autograd graph: one from the parameters would live through the recording and
        # tie their gradients to the stream on which it was built.
        with torch.no_grad():
            self._inputs = map_tensors(torch.clone, inputs)
            kept = [tensor.clone() for tensor in changed]
        random, current = torch.cuda.get_rng_state(), torch.cuda.current_stream()
        self.draws, recording = False, False
        self._graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
        try:
            # Worth the time: algorithms replayed thousands of times are chosen by benchmarking.
            with _cudnn_benchmark():
                _warm_up(function, self._inputs)
                self.draws = not torch.equal(random, torch.cuda.get_rng_state())
                torch.cuda.set_rng_state(random)
                recording = True
                # Affects this thread only: others (pinning batches, say) may carry on meanwhile.
                with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                    self._outputs = function(self._inputs)
                recording = False
        except RuntimeError as error:
            raise RecordingError(str(error), draws_are_lost=self.draws and recording) from error
        finally:
            torch.cuda.set_stream(current)  # a failed recording leaves its own stream current
            torch.cuda.synchronize()
            if not recording:
                torch.cuda.set_rng_state(random)
            with torch.no_grad():
                for tensor, value in zip(changed, kept, strict=True):
                    tensor.copy_(value)

    def __call__(self, inputs: Any) -> Any:
        """Run on new inputs; the returned tensors are overwritten by the next call."""
        for static, fresh in zip(tensors_of(self._inputs), tensors_of(inputs), strict=True):
            if static.shape != fresh.shape or static.dtype != fresh.dtype:
                raise ValueError(
                    f"inputs: recorded with {tuple(static.shape)} {static.dtype}, got "
                    f"{tuple(fresh.shape)} {fresh.dtype}"
                )
            static.copy_(fresh, non_blocking=True)
        self._graph.replay()
        return self._outputs


class Recorded:
    """A function that is recorded at its first call if possible, and otherwise called directly.

    Args:
        function: as for :class:`CapturedFunction`.
        changed: returns the tensors that the function changes in place.
        kind: returns a key for what the function currently does, if Python makes it do different
            things: each is recorded separately. A call's results are then overwritten by any other
            call.
        obstacle: why the function cannot be recorded, for the log; "" if recording is not wanted;
            None if nothing is known to prevent it.
        plain: called if the function is not recorded; ``function`` if None.
        may_draw: whether a replay may draw random numbers.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        changed: Callable[[], Iterable[Tensor]] = list,
        *,
        kind: Callable[[], Hashable] = lambda: None,
        obstacle: str | None = None,
        plain: Callable[[Any], Any] | None = None,
        may_draw: bool = True,
    ) -> None:
        self._function = function
        self._changed = changed
        self._plain = plain or function
        self._may_draw = may_draw
        self._kind = kind
        self._captured: dict[Hashable, CapturedFunction] = {}
        self._tries = obstacle is None
        if obstacle:
            self._give_up(obstacle)

    @property
    def is_plain(self) -> bool:
        """Whether it is not recorded, and will not be."""
        return not self._captured and not self._tries

    def __call__(self, inputs: Any) -> Any:
        """Run on inputs; the results of a replay are overwritten by the next call.

        Raises:
            ConfigError: recording failed, and the state of the device's random generator is lost.
        """
        kind = self._kind()
        if self._tries and kind not in self._captured:
            self._record(kind, inputs)
        return self._captured.get(kind, self._plain)(inputs)

    def _record(self, kind: Hashable, inputs: Any) -> None:
        beside = next(iter(self._captured.values()), None)
        try:
            captured = CapturedFunction(self._function, inputs, self._changed(), beside)
        except RecordingError as error:
            if error.draws_are_lost:
                raise ConfigError(
                    f"CUDA_GRAPH: the step cannot be recorded ({error}); set it to False "
                    "and restart"
                ) from error
            self._give_up(f"recording it failed: {error}")
            return
        if captured.draws and not self._may_draw:
            self._give_up("it draws random numbers, which students side by side must not share")
            return
        self._captured[kind] = captured

    def _give_up(self, reason: str) -> None:
        self._tries = False
        logger.warning("CUDA_GRAPH: the step runs kernel by kernel: %s", reason)


def _warm_up(function: Callable[[Any], Any], inputs: Any) -> None:
    """Call the function a few times on a side stream, as recording does."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function(inputs)
    current.wait_stream(side)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to each tensor of a tree; other leaves stay, tuples become lists."""
    if isinstance(tree, Tensor):
        return function(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {
            field.name: map_tensors(function, getattr(tree, field.name)) for field in fields(tree)
        }
        return type(tree)(**values)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [map_tensors(function, value) for value in tree]
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in traversal order."""
    leaves: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        leaves.append(tensor)
        return tensor

    map_tensors(keep, tree)
    return leaves
