"""Pack what a GPU machine without network needs: ``make gpu-bundle``.

The bundle holds the compiled operators, wheels of the packages that the machine lacks, detectron2,
and data sets if given. ``python tools/gpu_check.py --bundle DIR`` unpacks it there.
TORCH_CUDA_ARCH_LIST sets the GPU architectures.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 60
# Needed by detection and the configurations, and missing on a typical PyTorch machine.
WHEELS = (
    "yacs>=0.1.8",
    "termcolor>=1.1",
    "pycocotools>=2.0.11",
    "hydra-core==1.3.*",
    "omegaconf==2.3.*",  # hydra-core 1.3 refuses later ones
)
SOURCES = ("fvcore==0.1.5.post20221221", "iopath==0.1.10", "antlr4-python3-runtime==4.9.*")
LIBC = range(17, 40)  # glibc 2.N of the accepted manylinux wheels


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the bundle; exit with a message if a part is unavailable."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle", metavar="DIR")
    parser.add_argument("--python", default="3.12", help="the machine's Python version")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="FOLDER_OR_ZIP")
    parser.add_argument("--no-build", action="store_true", help="pack the libraries in pcka/")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    (given.out / "wheels").mkdir(parents=True)
    build = libraries(given.out, build=not given.no_build)
    wheels(given.out / "wheels", given.python)
    detectron2(given.out / "wheels" / "detectron2.zip")
    data(given.out / "data", given.data)
    files = sorted(path for path in given.out.rglob("*") if path.is_file())
    manifest = {
        "python": given.python,
        "commit": commit(),
        "build": build,
        "files": {str(path.relative_to(given.out)): path.stat().st_size for path in files},
    }
    (given.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name, size in manifest["files"].items():
        print(f"{size / (1 << 20):8.2f} MiB  {name}")
    total = sum(path.stat().st_size for path in files) / (1 << 20)
    print(f"{total:8.2f} MiB  {given.out}")
    if total > LIMIT_MIB:
        raise SystemExit(f"the bundle is larger than {LIMIT_MIB} MiB: pack fewer --data")


def commit() -> str:
    """The commit that is packed; the machine need not have its history."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"


def libraries(folder: Path, *, build: bool) -> dict[str, str]:
    """Pack the compiled operators, stripped; return the build information."""
    with tempfile.TemporaryDirectory() as scratch:
        source = ROOT
        if build:
            command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={scratch}/lib"]
            _run([*command, f"--build-temp={scratch}/temp"], cwd=ROOT)
            source = Path(scratch) / "lib"
        found = sorted((source / "pcka").glob("*.abi3.so"))
        if not any(path.name.startswith("_cuda.") for path in found):
            raise SystemExit("no CUDA operators were compiled: see the build above")
        for library in found:
            shutil.copyfile(library, folder / library.name)
            _run(["strip", "--strip-unneeded", str(folder / library.name)])
    answer = ctypes.CDLL(str(folder / "_build_info.abi3.so")).pcka_build_info
    answer.restype = ctypes.c_char_p
    return json.loads(answer())


def wheels(folder: Path, python: str) -> None:
    """Fetch wheels for another Python; source packages are pure Python and built with this one."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in LIBC]
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    target += [*platforms, "--platform=manylinux2014_x86_64", f"--dest={folder}"]
    _run([*pip, "download", "--no-deps", *target, *WHEELS])
    _run([*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", *SOURCES])
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-cp"
    if foreign := [wheel.name for wheel in folder.glob("*.whl") if tag in wheel.name]:
        raise SystemExit(f"built only for this Python: {', '.join(foreign)}")


def detectron2(archive: Path) -> None:
    """Pack the Python files of the installed detectron2, which must have no C++ extension."""
    found = importlib.util.find_spec("detectron2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("detectron2 is not installed: python tools/install_detectron2.py")
    package = Path(found.submodule_search_locations[0])
    if any(package.glob("_C.*.so")):
        raise SystemExit("detectron2 was compiled for this Python: pack one without an extension")
    _zip(archive, package, package.parent)


def data(folder: Path, sets: Iterable[Path]) -> None:
    """Pack each data set as one archive."""
    for path in sets:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            _zip(folder / f"{path.name}.zip", path, path)
        elif zipfile.is_zipfile(path):
            shutil.copyfile(path, folder / path.name)
        else:
            raise SystemExit(f"--data {path}: expected a folder or a zip archive")


def _zip(archive: Path, folder: Path, root: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                packed.write(path, path.relative_to(root))


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, check=True, cwd=cwd)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{' '.join(command[:6])} ...: {error}") from None


if __name__ == "__main__":
    main()
