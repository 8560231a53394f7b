"""Eager code through ``torch.compile``, and its compilation ahead of timing.

``python -m benchmarks.compiled`` compiles the cases of ``operators_gpu.py`` in parallel
processes, into the cache TORCHINDUCTOR_CACHE_DIR, which they share with the timing process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import device, report
from benchmarks.baselines import eager_patch_cka
from benchmarks.cases import GPU_CASES, Case, MapCase
from benchmarks.variants import Alignment, step

COMPILED = "compiled eager"


def compiled_names(*, quick: bool) -> list[str]:
    """Return the rows of the two largest levels only: compiling takes longer than all the rest."""
    names = [name for name in GPU_CASES if name.startswith(("p2_rows", "p3_rows"))]
    return names[:1] if quick else names


def compiled_eager(case: Case, on: str) -> Alignment:
    """Return the eager baseline, compiled for the case's single shape.

    Inductor compiles it on a GPU. On a CPU it is only traced, to check that it runs.
    """
    assert isinstance(case, MapCase)
    torch._dynamo.reset()  # otherwise all shapes count as recompilations of one function
    settings: dict[str, Any] = case.settings
    backend = "inductor" if on == "cuda" else "aot_eager"
    function = partial(eager_patch_cka, **settings)
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile the cases, each in its own process, or only the named one in this process."""
    parser = report.parser("Compile eager code ahead of its timing.")
    report.add_device(parser)
    parser.add_argument("--case", help="compile it in this process")
    options = parser.parse_args(arguments)
    if options.case:
        case: Case = GPU_CASES[options.case]
        case = case.quick() if options.quick else case
        compiled = compiled_eager(case, options.device)
        step(compiled, *case.inputs(options.seed, options.device))
        device.synchronize(options.device)
        return
    names = compiled_names(quick=options.quick)
    command = [sys.executable, "-m", "benchmarks.compiled", "--device", options.device]
    command += ["--quick"] if options.quick else []
    environment = report.start(options.device, options)
    running = {name: subprocess.Popen([*command, "--case", name]) for name in names}
    failed = [name for name, process in running.items() if process.wait() != 0]
    line = f"{len(names) - len(failed)} of {len(names)} compiled"
    print(line, flush=True)
    report.write(options.output, "compiled", environment, [{"failed": failed}], [line])
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
