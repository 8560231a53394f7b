"""Every operator on small odd shapes, in every layout and dtype, for a memory checker to watch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import pcka

# (shape, patch): resized both ways, tails in every dimension, one patch, one channel, no resize.
MAPS = [((2, 5, 33, 41), (16, 16)), ((3, 3, 9, 14), (2, 5)), ((1, 1, 32, 24), (8, 8))]
QUICK_MAPS = MAPS[1:2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A checker takes milliseconds per kernel: only one case without centering.
OPTIONS = (
    *itertools.product(("channel", "batch", "position"), ("rows", "columns"), (True,)),
    ("channel", "rows", False),
)


def main(device: str, *, quick: bool) -> None:
    """Run all operators, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    calls = 0
    for (shape, patch), dtype in itertools.product(QUICK_MAPS if quick else MAPS, DTYPES):
        # Made on the CPU: a checker of initialisation need not follow other kernels' writes.
        maps = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        student, teacher = (x.to(dtype) for x in maps)
        for own in layouts(student, device):
            for group_by, relation, center in OPTIONS:
                alignment = pcka.patch_cka(
                    own.requires_grad_(),
                    teacher.to(device),
                    patch_size=patch,
                    group_by=group_by,
                    relation=relation,
                    center=center,
                )
                alignment.sum().backward()
                calls += 1
        x, y = student.flatten(1).to(device).requires_grad_(), teacher.flatten(1).to(device)
        for a, b in ((x, y), (x.t(), y.t())):
            pcka.cka(a, b).backward()
        pcka.patch_gram(student.to(device).requires_grad_(), patch_size=patch).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of patch_cka on {device}")


def layouts(x: Tensor, device: str) -> Iterator[Tensor]:
    """Contiguous, channels-last, every second channel, and off the allocator's alignment."""
    yield x.to(device)
    yield x.to(device).contiguous(memory_format=torch.channels_last)
    yield x.repeat_interleave(2, dim=1).to(device)[:, ::2]
    padded = torch.cat([x.new_zeros(1), x.flatten()]).to(device)
    yield padded[1:].view(x.shape)


if __name__ == "__main__":
    main(sys.argv[1], quick="--quick" in sys.argv)
