"""Cost of running a model: size, multiply-adds, latency on this machine."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from pcka.engine.cost import ROUNDS, Call, median_seconds
from pcka.modes import evaluation_mode

SECONDS = 4.0  # approximate budget for timing one batch size
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        parameters: number of parameters.
        state_bytes: bytes of parameters and buffers.
        macs: multiply-adds of the forward pass of one input; None if the model cannot be traced.
        uncounted: operators of the pass that are known to multiply but are not counted.
    """

    parameters: int
    state_bytes: int
    macs: int | None
    uncounted: tuple[str, ...] = ()


# The other operators that fvcore does not count add, copy or compare, as norms and activations do.
MULTIPLYING = ("attention", "mm", "conv", "linear", "matmul", "einsum", "lstm", "gru")


@torch.no_grad()
def model_size(model: nn.Module, inputs: Tensor) -> ModelSize:
    """Count a model's parameters, bytes and multiply-adds; its modules keep their modes.

    Args:
        model: takes ``inputs``.
        inputs: one input, in a batch of one if the model takes batches.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from how fvcore defines its losses
        from fvcore.nn import FlopCountAnalysis
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    parameters = sum(p.numel() for p in model.parameters())
    with evaluation_mode(model):
        counted = FlopCountAnalysis(model, (inputs,))
        counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counted.tracer_warnings("none")
        try:
            macs = int(counted.total())
        except Exception as error:  # tracing a model can raise errors of many types
            logging.getLogger("pcka").warning("MACs are not counted: %s", str(error).strip())
            return ModelSize(parameters, size, None)
        uncounted = (name.removeprefix("aten::") for name in counted.unsupported_ops())
    multiplying = {name for name in uncounted if any(part in name for part in MULTIPLYING)}
    return ModelSize(parameters, size, macs, tuple(sorted(multiplying)))


@torch.no_grad()
def latencies(calls: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Return name -> milliseconds per call: the median over calls in turn, after a warm-up.

    At most :data:`pcka.engine.cost.ROUNDS` rounds, and fewer if calls are slow.

    Args:
        calls: name -> a forward pass, of a model in evaluation mode.
        device: the device that they run on.
    """
    for call in calls.values():
        call()
    start = time.perf_counter()
    for call in calls.values():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - start
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(SECONDS / max(taken, 1e-9))))
    seconds = median_seconds(repeat(calls), rounds, device)
    return {name: 1000 * value for name, value in seconds.items()}
