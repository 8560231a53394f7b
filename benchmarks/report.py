"""Shared by the scripts: arguments, description of the machine, and output files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import pcka
from benchmarks.cases import CASES, Case, select
from pcka.engine.environment import describe_environment

_VECTOR_FLAGS = ("avx", "fma", "f16c", "amx", "sve", "asimd", "bf16")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every script."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="smoke test with tiny sizes")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--threads", type=int, help="default: 2, or up to 8 with a GPU")
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the figures (JSON) and a plot"
    )
    return result


def add_device(arguments: argparse.ArgumentParser, default: str = "cuda") -> None:
    arguments.add_argument("--device", choices=["cuda", "cpu"], default=default)


def add_cases(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--cases", nargs="+", default=["*"], metavar="NAME", help="cases by name, or 'p3*'"
    )


def add_rounds(arguments: argparse.ArgumentParser, rounds: int, loop_rounds: int) -> None:
    arguments.add_argument(
        "--rounds", type=_count(1), default=rounds, help="samples of each variant, 1 or more"
    )
    arguments.add_argument(
        "--loop-rounds",
        type=_count(0),
        default=loop_rounds,
        help="samples of the loops; 0 skips them",
    )


def _count(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for integers of ``minimum`` or more."""

    def count(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
        return int(text)

    return count


def effort(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of :func:`benchmarks.harness.compare` that set how long to measure."""
    if options.quick:
        return {"rounds": 2, "loop_rounds": 1, "sample_seconds": 0.0}
    return {"rounds": options.rounds, "loop_rounds": options.loop_rounds}


def chosen_cases(
    arguments: argparse.ArgumentParser,
    options: argparse.Namespace,
    cases: Mapping[str, Case] = CASES,
) -> list[Case]:
    """Return the requested cases; exit with a message if there are none of that name."""
    try:
        return select(options.cases, quick=options.quick, cases=cases)
    except ValueError as error:
        arguments.error(str(error))


def start(device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Set threads and seed; print and return the environment of the measurement.

    Raises:
        SystemExit: the operators are not compiled, so that there is nothing to measure; with 2: a
            GPU is requested, but there is none.
    """
    if not pcka.build_info()["cuda_loaded" if device == "cuda" else "extension"]:
        raise SystemExit(f"the compiled operators are not in use on {device}: see the README")
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here", file=sys.stderr)
        raise SystemExit(2)
    if options.threads is None:
        options.threads = min(8, os.cpu_count() or 2) if device == "cuda" else 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    environment = {
        **describe_environment(options.seed, torch.device(device)),
        "command_line": [_anywhere(word) for word in sys.argv],
        "processor": _processor(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(_heading(environment), flush=True)
    return environment


def _anywhere(word: str) -> str:
    """Return a word of the command line without an absolute path, the same on every machine."""
    path, root = Path(word), Path(__file__).resolve().parents[1]
    if not path.is_absolute():
        return word
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _heading(environment: Mapping[str, Any]) -> str:
    processor = environment["processor"]
    lines = {
        "processor": processor["model"],
        "vector flags": " ".join(processor["vector_flags"]),
        "device": environment["device"],
        "torch": f"{environment['torch']}, {environment['torch_cpu_capability']}",
        "threads": environment["threads"],
        "seed": environment["seed"],
        "command": shlex.join(environment["command_line"]),
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items()) + "\n"


def _processor() -> dict[str, object]:
    """Return model and vector instructions, from ``/proc/cpuinfo`` if it exists."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    return {
        "model": entries.get("model name") or platform.processor() or platform.machine(),
        "vector_flags": sorted(flag for flag in flags if flag.startswith(_VECTOR_FLAGS)),
    }


def write(
    output: Path | None,
    name: str,
    environment: Mapping[str, Any],
    records: Sequence[Any],
    summary: Sequence[str] = (),
) -> None:
    """Write ``name.json`` if an output folder is given. ``summary``: a few lines.

    It is replaced as a whole, so that a script that is stopped leaves the last complete file.
    """
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment, "records": records, "summary": list(summary)}
        part = output / f"{name}.json.part"
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(output / f"{name}.json")


def plot_points(
    path: Path,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    quantity: str,
) -> None:
    """Plot a row of points for each label, on a logarithmic axis; None and 0 leave a gap."""
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(series.items(), "osD^v"):
        axes.plot([value or nan for value in values], range(len(labels)), marker, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(quantity)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(series), fontsize="small")
    figure.savefig(path, dpi=120)
