"""Unpacks a bundle made by ``tools/gpu_bundle.py``."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from tools.gpu.runner import ROOT

LIBRARIES = ("_build_info.abi3.so", "_cpu.abi3.so", "_cuda.abi3.so")


def manifest(bundle: Path) -> dict[str, Any]:
    """What was packed, and from which commit.

    Raises:
        ValueError: not a bundle.
    """
    try:
        found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"--bundle {bundle}: no manifest.json there; run make gpu-bundle"
        ) from None
    return found


def unpack(bundle: Path, work: Path) -> dict[str, str]:
    """Put the compiled operators into ``pcka/`` and the rest below ``work``.

    Returns:
        Environment variables that make the packages and the data available: ``PYTHONPATH`` and, if
        there is data, ``PCKA_GPU_DATA``, a folder with one subfolder per data set.
    """
    for name in LIBRARIES:
        if (bundle / name).exists():
            # Replaced, not overwritten: a process that has it loaded keeps its copy.
            shutil.copyfile(bundle / name, ROOT / "pcka" / f"{name}.part")
            (ROOT / "pcka" / f"{name}.part").replace(ROOT / "pcka" / name)
    site = work / "site"
    for package in sorted((bundle / "wheels").glob("*")):
        _extract(package, site)
    variables = {"PYTHONPATH": str(site)}
    data = sorted((bundle / "data").glob("*.zip"))
    for archive in data:
        _extract(archive, work / "data" / archive.stem)
    if data:
        variables["PCKA_GPU_DATA"] = str(work / "data")
    return variables


def _extract(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
