"""Make detectron2 importable: ``python tools/install_detectron2.py``; run by ``make``.

An importable detectron2 is kept. Otherwise the official repository is installed, if it can be
reached. Failing that, the package ``pb1-detectron2`` 0.6 is used, which contains the unmodified
Python files of the official release 0.6 without its C++ sources: it is fetched by its hash and
installed as a pure-Python wheel named ``detectron2``, with the repairs of ``REPAIRS`` in the
wheel's own files. RoIAlign and non-maximum suppression come from torchvision; deformable
convolutions and rotated boxes need the official build, and say so when used.

Only the standard library is imported here: this runs before the rest is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
REACHABLE_SECONDS = 20


class RepairError(RuntimeError):
    """A file of the release is not what a repair expects."""


@dataclass(frozen=True)
class Repair:
    """One replacement in the release's files, and why it is needed.

    Attributes:
        files: glob below the package's root.
        pattern: regular expression to replace; must match somewhere.
        replacement: as in ``re.sub``.
        reason: what fails without it.
    """

    files: str
    pattern: str
    replacement: str
    reason: str


REPAIRS = (
    Repair(
        "detectron2/**/*.py",
        r"\bnp\.(bool|int|float|object|str)\b",
        r"\1",
        "numpy 1.24 removed its aliases of the built-in types",
    ),
    Repair(
        "detectron2/data/transforms/transform.py",
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        "Pillow 10 removed the alias",
    ),
    Repair(
        "detectron2/model_zoo/model_zoo.py",
        r"import pkg_resources\n",
        "",
        "setuptools 81 removed pkg_resources",
    ),
    Repair(
        "detectron2/model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*\"detectron2\.model_zoo\",\s*",
        "os.path.join(os.path.dirname(__file__), ",
        "setuptools 81 removed pkg_resources",
    ),
    Repair(
        "detectron2/evaluation/coco_evaluation.py",
        r"use_fast_impl=True",
        "use_fast_impl=False",
        "the fast COCO evaluation is part of the C++ extension; pycocotools gives the same figures",
    ),
    Repair(
        "detectron2/modeling/meta_arch/retinanet.py",
        r"get_norm\(norm, 1\)",
        "get_norm(norm, 32)",
        "torch refuses 32 groups of one channel, here created only to inspect the type",
    ),
    Repair(
        "detectron2/utils/collect_env.py",
        r"import detectron2\._C as _C",
        "raise ImportError('this build has no C++ extension')",
        "it would ask the extension for its compiler",
    ),
)

# In place of the C++ extension, which detectron2.layers imports and uses for a few operators only.
EXTENSION_STUB = '''"""This build has no C++ extension; its operators say so when used."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name}: this build of detectron2 has no C++ extension (deformable "
        "convolutions, rotated boxes, fast COCO evaluation); install detectron2 from its "
        "official repository to use it"
    )
'''

# The release's own setup.py compiles the missing C++ sources and pins black and iopath to versions
# that no longer install; its visualizer needs OpenCV.
SETUP = """from setuptools import find_packages, setup

setup(
    name="detectron2",
    version="0.6",
    description="detectron2 0.6, its Python files alone",
    packages=find_packages(include=["detectron2", "detectron2.*"]),
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8",
        "tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5", "iopath>=0.1.7",
        "omegaconf>=2.1", "hydra-core>=1.1", "opencv-python-headless",
    ],
)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Install detectron2 the best available way, unless it is importable."""
    about = __doc__.partition(":")[0]
    argparse.ArgumentParser(description=f"{about}.").parse_args(arguments)
    if importlib.util.find_spec("detectron2") is not None:
        print("detectron2: kept as is")
    elif not _install_official():
        install_release()


def install_release() -> None:
    """Install release 0.6 from its package, with the repairs."""
    with tempfile.TemporaryDirectory() as folder:
        source = fetch_release(Path(folder))
        repair(source)
        _pip("install", "--no-build-isolation", str(source))
    print("detectron2: release 0.6, Python files only, patched for current libraries")


def fetch_release(folder: Path) -> Path:
    """Download and unpack the release into ``folder``; pip refuses a file with another hash."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    _pip("download", *options, "--dest", str(folder), "-r", str(wanted))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def repair(source: Path) -> None:
    """Apply ``REPAIRS`` to the unpacked release, and give it a build without C++.

    Raises:
        RepairError: a repair finds nothing to replace.
    """
    for item in REPAIRS:
        if not sum(_replace(path, item) for path in sorted(source.glob(item.files))):
            raise RepairError(f"{item.files}: expected {item.pattern!r} ({item.reason})")
    (source / "detectron2" / "_C.py").write_text(EXTENSION_STUB)
    (source / "setup.py").write_text(SETUP)


def _replace(path: Path, item: Repair) -> int:
    text, count = re.subn(item.pattern, item.replacement, path.read_text())
    if count:
        path.write_text(text)
    return count


def _install_official() -> bool:
    """Install the official main branch; return False if it cannot be reached or built."""
    try:
        probe = ["git", "ls-remote", "--exit-code", REPOSITORY, "HEAD"]
        subprocess.run(probe, check=True, capture_output=True, timeout=REACHABLE_SECONDS)
        _pip("install", "--no-build-isolation", f"git+{REPOSITORY}")
    except (subprocess.SubprocessError, OSError) as error:
        print(f"detectron2: the official repository cannot be used ({type(error).__name__})")
        return False
    print("detectron2: installed from the official repository")
    return True


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
