"""Write a student that plain detectron2 loads: ``python detection/export.py --config-file F ...``.

The folder then holds ``model.pth``, the student's weights alone, and its configuration:
``config.yaml`` for detectron2's ``get_cfg()``, or for FCOS, GFL and RepPoints a LazyConfig,
``lazy_config.yaml``, with the modules that it needs and detectron2 has not. Of a segmenter with a
dilated trunk or a head on one, ``dilated.py`` stands beside it: ``import dilated`` makes detectron2
know their names.
"""

from __future__ import annotations

import detection  # noqa: F401  (answers --help, before what takes seconds to import)

# isort: split

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig, OmegaConf

from detection import dilated
from detection.architectures import MODULES, lazy_config
from detection.arguments import export_parser
from detection.checkpoint import load_weights
from detection.config import build_student, load_config, student_architecture
from detection.meta_arch import check_exportable
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text
from pcka.files import atomic_save

WEIGHTS, YAML, LAZY = "model.pth", "config.yaml", "lazy_config.yaml"
CODE = Path(dilated.__file__).name
STANDALONE = ("dilated", "gfl_model", "pyramid", "reppoints_model")  # need detectron2 alone
OF_RUNS = ("last_checkpoint", "metrics.json", "log.txt")  # what a training leaves in its folder
OF_FILES = (".onnx", ".pth", ".pt", ".pkl", ".safetensors", ".yaml", ".yml", ".ts")


def export_student(cfg: CfgNode, weights: str, folder: Path) -> Path:
    """Write the student's weights and configuration; return the configuration's path.

    Args:
        cfg: the run's configuration.
        weights: a checkpoint of the run.
        folder: made where it is missing; an older export in it is replaced.

    Raises:
        ValueError: weights that do not fill the student, a student that plain detectron2 does not
            know, or a folder that cannot be one or holds a training run.
    """
    check_exportable(cfg)
    check_folder(folder)
    architecture = student_architecture(cfg)
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    student = build_student(on_cpu)
    load_weights(student, weights)
    folder.mkdir(parents=True, exist_ok=True)
    # Of an older export: no configuration may stand by other weights.
    for name in (YAML, LAZY, *(f"{module}.py" for module in STANDALONE)):
        (folder / name).unlink(missing_ok=True)
    atomic_save({"model": student.state_dict()}, folder / WEIGHTS)
    if architecture in MODULES:
        model = lazy_config(architecture, cfg)
        _bring_along(model, folder)
        lazy = {"model": model, "input_format": cfg.INPUT.FORMAT}
        LazyConfig.save(OmegaConf.create(lazy), str(folder / LAZY))
        return folder / LAZY
    if {cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SEM_SEG_HEAD.NAME} & {*dilated.__all__}:
        write_text(folder / CODE, Path(dilated.__file__).read_text())
    write_text(folder / YAML, _plain_config(cfg, architecture, folder / WEIGHTS).dump())
    return folder / YAML


def _bring_along(node: DictConfig, folder: Path) -> None:
    """Copy the modules of this project that a LazyConfig names, and name the copies in it."""
    target: Any = node.get("_target_")
    package, _, module = getattr(target, "__module__", "").rpartition(".")
    if package == "detection" and module in STANDALONE:
        write_text(folder / f"{module}.py", Path(inspect.getfile(target)).read_text())
        node._target_ = f"{module}.{target.__qualname__}"
    for value in node.values():
        if isinstance(value, DictConfig):
            _bring_along(value, folder)


def check_folder(folder: Path) -> None:
    """Refuse a place that an export would spoil, or that was meant as a file.

    Raises:
        ConfigError: a file, a name that looks like one, or the folder of a training run.
    """
    if folder.suffix in OF_FILES or folder.is_file():
        raise ConfigError(
            f"--output: expected a folder, got {str(folder)!r}; {WEIGHTS} and a configuration go "
            "into it. ONNX is not written: docs/detection.md, What a run leaves, says why"
        )
    if any((folder / name).exists() for name in OF_RUNS) or _of_a_run(folder / YAML):
        raise ConfigError(
            f"--output: {str(folder)!r} holds a training run, whose {YAML} a resume needs; take "
            "another folder"
        )


def _of_a_run(config: Path) -> bool:
    """A run's configuration holds this project's keys, an export's holds detectron2's alone."""
    return config.is_file() and "DISTILL:" in config.read_text(errors="replace").split("\n")


def _plain_config(cfg: CfgNode, architecture: str, weights: Path) -> CfgNode:
    """The keys that detectron2 itself knows."""
    known = get_cfg()
    _copy_known(cfg, known)
    known.MODEL.META_ARCHITECTURE = architecture
    known.MODEL.WEIGHTS = str(weights.resolve())
    return known


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode):
            _copy_known(source[key], value)
        else:
            target[key] = source[key]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Export as the arguments say; return the configuration's path."""
    given = export_parser().parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides)
    path = export_student(cfg, given.weights, Path(given.output))
    code = f", once it imported {CODE} beside them" if (path.parent / CODE).exists() else ""
    print(f"{path.parent / WEIGHTS} and {path}: plain detectron2 loads both{code}")
    return path


if __name__ == "__main__":
    run_command(main)
