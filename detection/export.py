"""Export a student to plain detectron2: ``python detection/export.py --config-file F ...``.

The output folder holds ``model.pth``, which contains only the student's weights, and the
configuration: ``config.yaml`` for detectron2's ``get_cfg()``, or for FCOS, GFL and RepPoints the
LazyConfig ``lazy_config.yaml``, with the modules that it needs and detectron2 lacks. For a
segmenter with a dilated backbone or head, ``dilated.py`` is included: ``import dilated`` registers
them with detectron2.
"""

from __future__ import annotations

import detection  # noqa: F401  (answers --help before the slow imports)

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
STANDALONE = ("dilated", "gfl_model", "pyramid", "reppoints_model")  # need only detectron2
OF_RUNS = ("last_checkpoint", "metrics.json", "log.txt")  # files that a training writes
OF_FILES = (".onnx", ".pth", ".pt", ".pkl", ".safetensors", ".yaml", ".yml", ".ts")


def export_student(cfg: CfgNode, weights: str, folder: Path) -> Path:
    """Write the student's weights and configuration; return the configuration's path.

    Args:
        cfg: the run's configuration.
        weights: a checkpoint of the run.
        folder: output folder; created if missing. An older export in it is replaced.

    Raises:
        ValueError: weights do not fit the student, plain detectron2 does not know the student, or
            the folder is a file or holds a training run.
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
    # Remove an older export first: its configuration must not be paired with the new weights.
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
    """Copy this project's modules that a LazyConfig names, and make it refer to the copies."""
    target: Any = node.get("_target_")
    package, _, module = getattr(target, "__module__", "").rpartition(".")
    if package == "detection" and module in STANDALONE:
        write_text(folder / f"{module}.py", Path(inspect.getfile(target)).read_text())
        node._target_ = f"{module}.{target.__qualname__}"
    for value in node.values():
        if isinstance(value, DictConfig):
            _bring_along(value, folder)


def check_folder(folder: Path) -> None:
    """Refuse a path that is meant as a file, or a folder that an export would damage.

    Raises:
        ConfigError: it is a file, looks like a file name, or is the folder of a training run.
    """
    if folder.suffix in OF_FILES or folder.is_file():
        raise ConfigError(
            f"--output: expected a folder, got {str(folder)!r}; {WEIGHTS} and a configuration go "
            "into it. ONNX is not supported; see docs/detection.md, Output files"
        )
    if any((folder / name).exists() for name in OF_RUNS) or _of_a_run(folder / YAML):
        raise ConfigError(
            f"--output: {str(folder)!r} holds a training run, which needs its {YAML} to resume; "
            "use another folder"
        )


def _of_a_run(config: Path) -> bool:
    """Whether the file holds this project's keys, as a run's does; an export's does not."""
    return config.is_file() and "DISTILL:" in config.read_text(errors="replace").split("\n")


def _plain_config(cfg: CfgNode, architecture: str, weights: Path) -> CfgNode:
    """Return the configuration with only the keys that detectron2 itself knows."""
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
    """Run the export given by the arguments; return the configuration's path."""
    given = export_parser().parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides)
    path = export_student(cfg, given.weights, Path(given.output))
    code = f", after importing {CODE} next to them" if (path.parent / CODE).exists() else ""
    print(f"{path.parent / WEIGHTS} and {path}: plain detectron2 loads both{code}")
    return path


if __name__ == "__main__":
    run_command(main)
