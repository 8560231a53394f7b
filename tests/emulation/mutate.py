"""Breaks the CUDA kernels in small ways, one at a time, and lists what the tests do not notice.

    python tests/emulation/mutate.py [--file patchify.cu] [--limit 10]

Each mutant removes a barrier or the guard of a tail, widens a bound, or swaps min and max, in the
device code of csrc/cuda; the emulator's tests then run on it. A mutant that survives must stand in
survivors.toml with the reason; any other makes the script fail. A failed test ends its mutant's
run.
"""

from __future__ import annotations

import argparse
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("csrc/cuda")
TIMEOUT = 600  # seconds, for a mutant that loops

# What is replaced, by what.
MUTATIONS = {
    "no barrier": (r"__syncthreads\(\);", ";"),
    "no guard": (r"if \([^;]*\) continue;", ";"),
    "wider bound": (r" < ", " <= "),
    "narrower guard": (r" >= ", " > "),
    "max for min": (r"\bmin\(", "max("),
    "min for max": (r"\bmax\(", "min("),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 1
    column: int
    kind: str
    source: str  # the line as it stands, stripped

    def applied_to(self, text: str) -> str:
        pattern, replacement = MUTATIONS[self.kind]
        lines = text.split("\n")
        line = lines[self.line - 1]
        end = re.compile(pattern).match(line, self.column).end()  # type: ignore[union-attr]
        lines[self.line - 1] = line[: self.column] + replacement + line[end:]
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.source}"


def device_lines(text: str) -> set[int]:
    """Numbers of the lines of top-level definitions that hold device code."""
    found: set[int] = set()
    block: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            block.append(number)
        if line in ("}", "};") or (not line and not is_open(text, block)):
            if any(re.search(r"__(device|global)__", text.split("\n")[n - 1]) for n in block):
                found.update(block)
            block = []
    return found


def is_open(text: str, block: list[int]) -> bool:
    """Whether the lines open more braces than they close."""
    lines = text.split("\n")
    joined = "".join(lines[n - 1] for n in block)
    return joined.count("{") > joined.count("}")


def mutants(file: Path) -> Iterator[Mutant]:
    text = file.read_text()
    inside = device_lines(text)
    for number, line in enumerate(text.split("\n"), 1):
        if number not in inside or line.lstrip().startswith("//"):
            continue
        for kind, (pattern, _) in MUTATIONS.items():
            for match in re.finditer(pattern, line.split("//")[0]):
                yield Mutant(file.name, number, match.start(), kind, line.strip())


class Workshop:
    """A copy of the sources with a build of the emulator's tests."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "source"
        self.build = folder / "build"
        ignored = shutil.ignore_patterns(".*", "build", "output", "*.so", "__pycache__")
        shutil.copytree(ROOT, self.root, ignore=ignored)
        cmake = ["cmake", "-S", self.root, "-B", self.build, "-G", "Ninja"]
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER="]
        subprocess.run([*cmake, *options], check=True, stdout=subprocess.DEVNULL)

    def survives(self) -> bool:
        """Whether the tests pass on the sources as they stand. What does not compile is dead."""
        target = ["--target", "test_kernels"]
        built = subprocess.run(["cmake", "--build", self.build, *target], capture_output=True)
        if built.returncode:
            return False
        test = self.build / "tests/emulation/test_kernels"
        with subprocess.Popen([test], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            # A line on stderr is a failure: what is left of the tests need not run.
            in_time = select.select([process.stderr], [], [], TIMEOUT)[0]
            if not in_time or process.stderr.readline():
                process.kill()
                return False
            return process.wait() == 0

    def survives_as(self, mutant: Mutant) -> bool:
        path = self.root / KERNELS / mutant.file
        text = path.read_text()
        path.write_text(mutant.applied_to(text))
        try:
            return self.survives()
        finally:
            path.write_text(text)


def justified(mutant: Mutant) -> str | None:
    """The reason in survivors.toml, if there is one."""
    listed = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text())
    for entry in listed.get("survivor", []):
        keys = (entry["file"], entry["mutation"], entry["line"])
        if keys == (mutant.file, mutant.kind, mutant.source):
            return str(entry["reason"])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", help="only the kernels of this file")
    parser.add_argument("--limit", type=int, help="stop after so many mutants")
    args = parser.parse_args()
    files = sorted((ROOT / KERNELS).glob(args.file or "*"))
    chosen = [mutant for file in files for mutant in mutants(file)][: args.limit]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if not workshop.survives():
            sys.exit("the tests fail on the kernels as they are")
        for mutant in chosen:
            if not workshop.survives_as(mutant):
                print("killed  ", mutant, flush=True)
                continue
            reason = justified(mutant)
            unexplained += reason is None
            print("SURVIVED", mutant, "--", reason or "not justified", flush=True)
    print(f"{len(chosen)} mutants, {unexplained} survivors without a reason")
    return unexplained > 0


if __name__ == "__main__":
    sys.exit(main())
