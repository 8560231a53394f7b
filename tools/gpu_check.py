"""Check everything that needs a GPU, in one command that ends in minutes.

``python tools/gpu_check.py --out DIR [--bundle DIR] [--only STAGE ...] [--skip STAGE ...]``

Needs a checkout, PyTorch and pytest; ``make gpu-bundle`` packs what else a machine without network
lacks. The stages, their order and their time limits are in ``tools/gpu/stages.py``. A stage that
fails or takes too long is reported, and the next one runs. ``DIR`` receives ``results.json``,
``report.md`` (tables), ``log.txt`` and a few files of the stages; the summary is printed last.

``--device cpu --quick`` rehearses everything in minutes without a GPU.

Exits with 0 if all stages passed, 1 if one did not, and immediately with 3 if the compiled
operators are not in use on the device.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a bare checkout

from tools.gpu import bundle, report
from tools.gpu.runner import ROOT, Runner, summary
from tools.gpu.stages import STAGES, choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages as the arguments specify; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="from make gpu-bundle")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smoke test with tiny sizes")
    names = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help=names)
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE")
    given = parser.parse_args(arguments)
    try:
        stages = choose(given.only, given.skip)
        manifest = bundle.manifest(given.bundle) if given.bundle else {}
    except ValueError as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.txt").write_text("")
    with tempfile.TemporaryDirectory(prefix="pcka-gpu-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        packed = bundle.unpack(given.bundle, work) if given.bundle else {}
        runner = Runner(
            given.out,
            work,
            given.device,
            quick=given.quick,
            environment=_environment(packed, work, given.device),
            bundle=manifest,
        )
        complete = runner.run(stages)
    try:
        tables = report.markdown(runner.results)
    except (KeyError, TypeError, ValueError) as error:  # the results are kept all the same
        tables = f"{type(error).__name__}: {error}; run python -m tools.gpu.report\n"
    (given.out / "report.md").write_text(tables)
    print("\n".join(["", *summary(runner.results)]), flush=True)
    if not complete:
        return 3
    return 1 if runner.failed else 0


def _environment(packed: dict[str, str], work: Path, device: str) -> dict[str, str]:
    """Environment variables of every stage: no silent fallback, no caches elsewhere."""
    paths = [str(ROOT), packed.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    return {
        **packed,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PCKA_REQUIRE": device,
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # several processes compile at the same time
        "TRITON_CACHE_DIR": str(work / "triton"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
    }


if __name__ == "__main__":
    # When terminated from outside, still stop the running stage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
