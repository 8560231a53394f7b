"""Compiles csrc/: C++ always, CUDA if nvcc and a CUDA build of torch are available.

Environment: PCKA_SKIP_EXTENSION=1 compiles nothing (every operator uses the eager reference),
PCKA_SKIP_CUDA=1 compiles no CUDA code, TORCH_CUDA_ARCH_LIST sets the GPU architectures.
All other package settings are in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

MINIMUM_TORCH = "2.10"  # whose stable ABI the operators use; also in pyproject.toml
# Oldest to newest; code for 8.6 also runs on 8.9, and the last one's PTX on all later ones.
DEFAULT_ARCHS = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
DEFAULT_ARCHS_BEFORE_12_8 = "7.5;8.0;8.6;9.0+PTX"


def say(line: str) -> None:
    print(f"pcka: {line}", file=sys.stderr, flush=True)


def stable_abi_macro() -> tuple[str, str]:
    major, minor = MINIMUM_TORCH.split(".")
    return "TORCH_TARGET_VERSION", f"0x{int(major):02x}{int(minor):02x}000000000000ULL"


class CudaToolkit:
    """nvcc, its version and the root of its toolkit."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        self.version = (int(found[1]), int(found[2])) if found else (0, 0)

    @classmethod
    def find(cls) -> CudaToolkit | None:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        candidates = [shutil.which("nvcc", path=str(Path(h, "bin"))) for h in homes if h]
        candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
        return next((cls(nvcc) for nvcc in candidates if nvcc), None)

    @property
    def root(self) -> str:
        """The real root: an nvcc on PATH may be a wrapper outside its toolkit."""
        dryrun = subprocess.run(
            [self.nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        ).stderr
        found = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
        return os.path.realpath(found[1].strip() if found else Path(self.nvcc).parent.parent)

    def obstacle(self, torch_cuda: str) -> str | None:
        """Why this toolkit cannot be used with a torch of that CUDA version; None if it can."""
        if self.version[0] == int(torch_cuda.split(".")[0]):
            return None
        major, minor = self.version
        return f"nvcc is CUDA {major}.{minor} and torch is CUDA {torch_cuda}: majors differ"


def cuda_toolkit(torch_cuda: str | None) -> tuple[CudaToolkit | None, str]:
    """The toolkit to compile with, or None and the reason in one line."""
    if os.environ.get("PCKA_SKIP_CUDA") == "1":
        return None, "PCKA_SKIP_CUDA=1"
    if torch_cuda is None:
        return None, "torch is a CPU build"
    toolkit = CudaToolkit.find()
    if toolkit is None:
        return None, "no nvcc found"
    obstacle = toolkit.obstacle(torch_cuda)
    return (None, obstacle) if obstacle else (toolkit, "")


def use_toolkit(toolkit: CudaToolkit) -> None:
    """Point torch's build helpers, which read the environment when imported, at the toolkit."""
    os.environ["CUDA_HOME"] = toolkit.root
    archs = DEFAULT_ARCHS if toolkit.version >= (12, 8) else DEFAULT_ARCHS_BEFORE_12_8
    # Set, not detected from the GPU: the build must work without a visible one.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def skip_reason() -> str | None:
    if os.environ.get("PCKA_SKIP_EXTENSION") == "1":
        return "PCKA_SKIP_EXTENSION=1"
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name.split()[0]) for name in compilers if name):
        return "no C++ compiler found"
    return None


def compiled_archs() -> list[str]:
    """What torch's build helpers derive from TORCH_CUDA_ARCH_LIST, e.g. ["sm_80", "compute_90"]."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    codes = re.findall(r",code=(\w+)", " ".join(_get_cuda_arch_flags()))
    return sorted(codes, key=lambda code: (int(re.sub(r"\D", "", code)), code))


def build_info_extension(torch_version: str, toolkit: CudaToolkit | None, note: str) -> Extension:
    values = {
        "PCKA_TORCH_VERSION": torch_version,
        "PCKA_MINIMUM_TORCH": MINIMUM_TORCH,
        "PCKA_CUDA_VERSION": "{}.{}".format(*toolkit.version) if toolkit else "",
        "PCKA_CUDA_ARCHS": ",".join(compiled_archs()) if toolkit else "",
        "PCKA_NOTE": note,
    }
    return Extension(
        "pcka._build_info",
        ["csrc/build_info.cpp"],
        define_macros=[(name, f'"{value}"') for name, value in values.items()],
        extra_compile_args=["-std=c++17"],
        py_limited_api=True,
        language="c++",
    )


def extensions() -> tuple[list[Extension], dict[str, type]]:
    reason = skip_reason()
    if reason:
        say(f"{reason}: nothing is compiled, the eager reference serves every operator")
        return [], {}
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "pcka: compiling the operators needs torch in this environment: install it first "
            "(pip install torch), drop --no-build-isolation, or set PCKA_SKIP_EXTENSION=1"
        ) from None
    toolkit, note = cuda_toolkit(torch.version.cuda)
    if toolkit:
        use_toolkit(toolkit)
    else:
        say(f"{note}: compiling the CPU operators only")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # py_limited_api: no Python symbols, so one library works with every Python and torch.
    common = {"define_macros": [stable_abi_macro()], "py_limited_api": True}
    optimised = ["-O3", "-fvisibility=hidden"]
    built = [
        build_info_extension(torch.__version__, toolkit, note),
        CppExtension(
            "pcka._cpu",
            sources("schema.cpp", "alignment.cpp", "cpu/*.cpp"),
            extra_compile_args=optimised,
            **common,
        ),
    ]
    if toolkit:
        say(f"compiling CUDA code for {os.environ['TORCH_CUDA_ARCH_LIST']}")
        common["define_macros"] = [stable_abi_macro(), ("USE_CUDA", None)]
        built.append(
            CUDAExtension(
                "pcka._cuda",
                sources("cuda/*.cu"),
                extra_compile_args={
                    "cxx": optimised,
                    "nvcc": ["-O3", "--expt-relaxed-constexpr"],
                },
                **common,
            )
        )
    return built, {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    # The wheel's tag, e.g. cp310-abi3: the operators use no Python symbols, so any version loads
    # them.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
