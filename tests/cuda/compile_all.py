"""Compiles the CUDA kernels for every architecture and says what became of them.

    python tests/cuda/compile_all.py [--arch 80 90] [--markdown]

For every kernel and architecture: registers, shared memory and spills as ptxas reports them, and
from the disassembly the wide accesses, float64 arithmetic, matrix instructions, local
memory and atomics; for the kernels that walk over a map, the instructions of their walks for each
value. Exits with 1 where a kernel spills, uses local memory or atomics, lacks the wide accesses
that it was written for, or takes more registers or instructions than it may. Needs nvcc, torch, and
cuobjdump with nvdisasm (from the toolkit, or `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v")
DEFINES = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL")  # as in setup.py

# Instructions that are counted: name -> pattern of the SASS.
COUNTED = {
    "wide loads": r"LDG\.E\S*\.128",
    "wide stores": r"STG\.E\S*\.(128|64)",  # 64 where vectors of float32 are rounded
    "float64": r"D(ADD|MUL|FMA|SETP)\b",
    "matrix": r"\w*(HMMA|IMMA|DMMA|GMMA)",
    "local": r"(LDL|STL)\b",
    "atomics": r"(ATOM|ATOMG|ATOMS|RED|REDG)\b",
}
FORBIDDEN = ("local", "atomics")
# What a kernel must have. Products go through the library's, so none has matrix instructions.
EXPECTED = {
    "center_over_columns_kernel": ("wide loads", "wide stores"),
    "sum_parts_kernel": ("wide loads",),
    "mix_kernel": ("wide loads", "wide stores"),
    "scale_kernel": ("wide loads", "wide stores"),
    "scale_groups_kernel": ("wide loads", "wide stores"),
}
# Kernels that walk over a map, of types of up to 32 bits: how many loads a value takes in a walk
# that only reads and in one that writes, and how many instructions all walks together may take for
# it. A walk is an innermost loop with loads, unrolled as the compiler likes: its length by the
# values that it loads.
WALKS = {
    "patchify_kernel": (2, 4, 60),
    "patchify_backward_kernel": (0, 3, 50),
}
REGISTERS = 64  # of those kernels: four blocks of 256 threads on a multiprocessor

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(\S+)([^;]*);")


@dataclass
class Kernel:
    """One kernel, as compiled for one architecture."""

    name: str
    arch: str
    registers: int = 0
    shared: int = 0  # bytes
    spills: int = 0  # bytes stored and loaded
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    code: list[tuple[int, str, str]] = field(default_factory=list)  # address, name, operands

    @property
    def walks(self) -> tuple[int, int, int] | None:
        """Loads of either kind and budget of a kernel that is held to its walks."""
        general = re.search("double|true", self.name)  # float64, or readers beyond those kept
        return None if general else WALKS.get(self.name.split("<")[0])

    def innermost_loops(self) -> Iterator[list[str]]:
        """The instructions' names of every loop without another one in it."""
        at = {address: i for i, (address, _, _) in enumerate(self.code)}
        spans = []
        for i, (address, name, operands) in enumerate(self.code):
            target = re.search(r"0x([0-9a-f]+)", operands)
            if name.startswith("BRA") and target and int(target[1], 16) < address:
                spans.append((at[int(target[1], 16)], i))
        for begin, end in spans:
            if not any(begin <= b and e <= end for b, e in spans if (b, e) != (begin, end)):
                yield [name for _, name, _ in self.code[begin : end + 1]]

    def instructions_per_value(self) -> float:
        """Of all walks together; 0 where the kernel is not held to them."""
        if self.walks is None:
            return 0
        total = 0.0
        for loop in self.innermost_loops():
            loads = sum(name.startswith("LDG") for name in loop)
            writes = any(name.startswith("STG") for name in loop)
            total += len(loop) * self.walks[writes] / loads if loads else 0
        return total

    def faults(self) -> Iterator[str]:
        if self.walks:
            if self.registers > REGISTERS:
                yield f"takes {self.registers} registers, more than {REGISTERS}"
            taken, budget = self.instructions_per_value(), self.walks[2]
            if not 0 < taken <= budget:
                yield f"takes {taken:.0f} instructions a value, more than {budget} or none"
        if self.spills:
            yield f"spills {self.spills} bytes"
        yield from (f"has {self.counts[what]} of {what}" for what in FORBIDDEN if self.counts[what])
        wanted = EXPECTED.get(self.name.split("<")[0], ())
        yield from (f"has no {what}" for what in wanted if not self.counts[what])


def find_tool(name: str) -> str | None:
    """A CUDA tool on PATH, in CUDA_HOME, or in the packages that pip installs."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    packages = [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([str(home), *packages]))


def compile_source(source: Path, archs: list[str], target: Path) -> str:
    """Compiles one file for all architectures; the newest also as PTX. Returns ptxas's report."""
    import torch

    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    include = Path(torch.__file__).parent / "include"
    command = [find_tool("nvcc") or "nvcc", *FLAGS, *DEFINES, *codes, "-isystem", include]
    result = subprocess.run(
        [*command, "-c", source, "-o", target], capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode:
        sys.exit(f"{source} does not compile:\n{result.stderr}")
    return result.stderr


def disassemble(target: Path) -> str:
    tool = find_tool("cuobjdump")
    disassembler = find_tool("nvdisasm")
    if tool is None or disassembler is None:
        sys.exit(
            "no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ["PATH"]])
    command = [tool, "-sass", target]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def short_name(mangled: str) -> str:
    """``patchify_kernel<float, float>`` of a mangled name."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    plain = plain.replace("(anonymous namespace)", "").split("(")[0]
    return re.sub(r"(\w*::)+|^void ", "", re.sub(r"^void ", "", plain)).strip()


def parse_report(report: str) -> Iterator[Kernel]:
    """The kernels of what ``ptxas -v`` printed."""
    kernel = None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel = Kernel(found[1], found[2])
        elif kernel and (found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill", line)):
            kernel.spills = int(found[1]) + int(found[2])
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(found[1])
            smem = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(smem[1]) if smem else 0
            yield kernel


def count_instructions(sass: str, kernels: dict[tuple[str, str], Kernel]) -> None:
    """Adds the counts of a disassembly to the kernels, keyed by mangled name and architecture."""
    arch, kernel = "", None
    for line in sass.splitlines():
        if found := re.search(r"code for sm_(\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            kernel = kernels.get((found[1], arch))
        elif kernel and (found := INSTRUCTION.search(line)):
            kernel.code.append((int(found[1], 16), found[2], found[3]))
            for what, pattern in COUNTED.items():
                kernel.counts[what] += re.match(pattern, found[2]) is not None


def compile_all(archs: list[str]) -> list[Kernel]:
    """Every kernel of csrc/cuda for every architecture."""
    compiled = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            target = Path(folder, source.stem + ".o")
            report = compile_source(source, archs, target)
            kernels = {(k.name, k.arch): k for k in parse_report(report)}
            count_instructions(disassemble(target), kernels)
            compiled += kernels.values()
    for kernel in compiled:
        kernel.name = short_name(kernel.name)
    return sorted(compiled, key=lambda k: (k.name, int(re.sub(r"\D", "", k.arch))))


def table(kernels: list[Kernel], markdown: bool) -> str:
    head = ["kernel", "sm", "registers", "shared", "spills", "a value", *COUNTED]
    rows = [
        [k.name, k.arch, str(k.registers), str(k.shared), str(k.spills)]
        + [f"{k.instructions_per_value():.1f}" if k.walks else ""]
        + [str(count) for count in k.counts.values()]
        for k in kernels
    ]
    if markdown:
        rule = ["---"] + ["---:"] * (len(head) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in [head, *rows]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    kernels = compile_all(args.arch)
    print(table(kernels, args.markdown))
    faults = [f"{k.name} for sm_{k.arch} {fault}" for k in kernels for fault in k.faults()]
    print("\n".join(faults) or f"{len(kernels)} kernels as they should be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
