"""The batch of all processes, for losses that relate the samples of a batch to one another."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pcka.losses.base import Outputs

# The DistributedDataParallel keyword that lets every process keep the buffers it computes; renamed
# in torch 2.14, which warns about the old name.
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return distributed.get_rank() if _initialized() else 0


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def from_first_process(value: Any) -> Any:
    """Broadcast the first process's plain object or tensor; every process must call this."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def sum_over_processes(x: Tensor) -> None:
    """Sum ``x`` over all processes, in place; a no-op in a single process."""
    if world_size() > 1:
        distributed.all_reduce(x)


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Average tensors over all processes, in place, with one message.

    Args:
        tensors: of one dtype, and of the same shapes in every process.
    """
    if world_size() == 1 or not tensors:
        return
    message = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(message)
    message /= world_size()
    for tensor, part in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_buffers(module: nn.Module) -> None:
    """Average the running statistics of batch norm over all processes.

    Other buffers (frozen statistics, pixel means) are the same everywhere; a mean would round them.
    """
    if world_size() == 1:
        return
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for buffer in norm.buffers(recurse=False):
                if buffer.is_floating_point():
                    distributed.all_reduce(buffer)
                    buffer /= world_size()


class _GatherBatch(torch.autograd.Function):
    """The batches of all processes, in rank order.

    Every process computes the same loss from the gathered batch, so the incoming gradients are the
    same in all of them, and the sum over processes that the adjoint requires is ``world_size``
    times the process's own part: no communication is needed. The mean over processes that
    DistributedDataParallel takes then leaves the gradient of that one loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        distributed.all_gather(parts, x)
        ctx.samples = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        start = rank() * ctx.samples
        return world_size() * grad[start : start + ctx.samples]


def gather_batch(x: Tensor) -> Tensor:
    """Gather the samples of all processes: ``(b, ...)`` -> ``(world_size * b, ...)``, by rank.

    Differentiable, for losses that every process computes identically from the gathered batch, and
    whose parameter gradients are averaged over processes, as DistributedDataParallel does: the
    parameters then get the gradient of the loss on the whole batch. The identity in a single
    process.

    Args:
        x: this process's part, of the same shape in every process.
    """
    if world_size() == 1:
        return x
    return _GatherBatch.apply(x.contiguous())


def gather_outputs(outputs: Outputs, taps: Iterable[str]) -> Outputs:
    """Apply :func:`gather_batch` to logits, indices and the features of some taps."""
    return Outputs(
        logits=None if outputs.logits is None else gather_batch(outputs.logits),
        features={name: gather_batch(outputs.feature(name)) for name in taps},
        indices=None if outputs.indices is None else gather_batch(outputs.indices),
    )
