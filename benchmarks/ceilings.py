"""The device's ceilings: bytes per second of a copy, operations per second of a product.

``python -m benchmarks.ceilings --device cuda``. Random data, because a GPU multiplies zeros faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import device as on_device
from benchmarks import report

COPY_BYTES, SIDE = 1 << 32, 8192
QUICK_COPY_BYTES, QUICK_SIDE = 1 << 24, 256
ROUNDS = 7


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, print and write the ceilings."""
    parser = report.parser("Measure the device's bandwidth and matrix rates.")
    report.add_device(parser)
    options = parser.parse_args(arguments)
    environment = report.start(options.device, options)
    found = measure(options.device, quick=options.quick)
    for name, value in found.items():
        print(f"{name}: {value:.4g}", flush=True)
    line = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    report.write(options.output, "ceilings", environment, [found], [line])
    return found


def measure(device: str, *, quick: bool = False) -> dict[str, float]:
    """Return GB/s of a copy (bytes read and written), TFLOP/s of square products by precision."""
    size, side = (QUICK_COPY_BYTES, QUICK_SIDE) if quick else (COPY_BYTES, SIDE)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2 * size / _seconds(partial(target.copy_, source), device) / 1e9}
    del source, target
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    for name, dtype, tf32 in (
        ("bfloat16 TFLOP/s", torch.bfloat16, False),
        ("TF32 TFLOP/s", torch.float32, True),
        ("float32 TFLOP/s", torch.float32, False),
    ):
        x, y = a.to(dtype), b.to(dtype)
        out = torch.empty_like(x)
        with tensor_float32(tf32):
            seconds = _seconds(partial(torch.mm, x, y, out=out), device)
        found[name] = 2 * side**3 / seconds / 1e12
    return found


@contextmanager
def tensor_float32(enabled: bool) -> Iterator[None]:
    """Set whether float32 products on a GPU may round their operands to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _seconds(call: on_device.Call, device: str) -> float:
    timer = on_device.timer(device)
    timer(call, 2)
    return statistics.median(timer(call, 3) for _ in range(ROUNDS))


if __name__ == "__main__":
    main()
