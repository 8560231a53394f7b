"""Reading a run's configuration: safe YAML, known keys only, values of the default's type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from classification.defaults import default_config
from pcka.engine.config import ConfigError, near_names
from pcka.engine.distill import check_methods, is_used, merge_settings, same_setting
from pcka.engine.yaml_files import YamlFileError, flatten, read_leaves

CONFIGS = Path(__file__).parents[1] / "configs" / "classification"

DATASETS = ("digits", "folder", "cifar10", "cifar100")

# Keys that may differ between a run and its continuation: they change nothing that is computed.
# (Another DATA.ROOT must hold the same images: the checkpoint knows their fingerprint.)
HARMLESS_KEYS = (
    "OUTPUT_DIR",
    "LOG_EVERY",
    "SAVE_EVERY",
    "CUDA_GRAPH",
    "DATA.ROOT",
    "DATA.DOWNLOAD",
    "DATA.MEMORY_GB",
    "DATA.WORKERS",
    "TEACHER.CACHE_DIR",
    "TEACHER.ACCURACY",
)


def load_config(
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    method: str = "",
) -> CfgNode:
    """Return the frozen configuration: defaults, the file (and its ``_BASE_``), overrides.

    Args:
        config_file: YAML file of plain values; a tag that would run code is refused.
        method: name of a file in the folder ``methods`` beside the configuration file, or else in
            ``configs/classification/methods``. It says which losses are summed, whatever the
            configuration file says, and their settings, where the configuration file does not.
        overrides: ``KEY VALUE`` pairs of the command line, e.g. ``["SOLVER.EPOCHS", "8"]``.

    Raises:
        ConfigError: unreadable file, unknown key (near matches are named), a value of another
            type than the default, or values that contradict each other.
    """
    cfg = default_config()
    if method:
        path = method_file(method, config_file)
        of_method = _read(path)
        merge_settings(cfg, of_method.items(), str(path))
    if config_file is not None:
        of_file = _read(config_file)
        if method:
            of_file.pop("DISTILL.METHODS", None)
            _refuse_saved(of_file, source=str(config_file))
        merge_settings(cfg, of_file.items(), str(config_file))
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides: expected pairs of KEY VALUE, got {len(overrides)} words: "
            f"{' '.join(overrides)!r}"
        )
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    merge_settings(cfg, pairs, "the command line")
    _check(cfg)
    cfg.freeze()
    return cfg


def _refuse_saved(of_file: Mapping[str, object], source: str) -> None:
    """A run's ``config.yaml`` says everything, and would leave nothing to a method."""
    everything = flatten(default_config())
    if of_file.keys() >= {key for key in everything if key.startswith(("SOLVER.", "DATA."))}:
        raise ConfigError(
            f"{source}: is the saved configuration of a run, whose settings would take the place "
            "of the method's; give the file of the pair, and other keys on the command line, or "
            "leave the method out"
        )


def method_file(method: str, config_file: str | Path | None = None) -> Path:
    """Return the file of a method for a configuration file.

    Raises:
        ConfigError: no such method; those that there are, are named.
    """
    known = method_files(config_file)
    if method not in known:
        raise ConfigError(f"method: no method is called {method!r}; {near_names(method, known)}")
    return known[method]


def method_files(config_file: str | Path | None = None) -> dict[str, Path]:
    """Return name -> file of all methods; those beside the configuration file come first."""
    folders = [CONFIGS] if config_file is None else [CONFIGS, Path(config_file).parent]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("methods/*.yaml"))}


def config_from_text(text: str) -> CfgNode:
    """Return the configuration that ``cfg.dump()`` wrote; keys that it lacks take their default."""
    cfg = default_config()
    merge_settings(cfg, flatten(yaml.safe_load(text)).items(), "the saved configuration")
    return cfg


def changed_keys(old: CfgNode, new: CfgNode) -> list[str]:
    """Return the keys in which a continuation would differ from the run that it continues.

    Other SOLVER.EPOCHS are harmless under a multistep schedule, whose rates do not depend on them;
    under a cosine, or with a warm-up of the distillation, they would change what was trained.
    """
    before, after = flatten(old), flatten(new)
    harmless = set(HARMLESS_KEYS)
    # A run may end after fewer epochs only where each one was evaluated.
    evaluated = new.EVAL_EVERY == 1 or new.SOLVER.EPOCHS >= old.SOLVER.EPOCHS
    if new.SOLVER.SCHEDULE == "multistep" and not new.DISTILL.WARMUP and evaluated:
        harmless.add("SOLVER.EPOCHS")
    return [
        key
        for key, value in after.items()
        if key not in harmless
        and is_used(key, new.DISTILL.METHODS)
        and not (key in before and same_setting(key, before[key], value))
    ]


def _read(path: str | Path) -> dict[str, object]:
    try:
        return read_leaves(path)
    except YamlFileError as error:
        raise ConfigError(str(error)) from error


CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "AUTOCAST": ("", "bfloat16", "auto"),
    "DATA.NAME": DATASETS,
    "SOLVER.SCHEDULE": ("multistep", "cosine"),
}
LEAST = {
    "LOG_EVERY": 1,
    "EVAL_EVERY": 1,
    "SAVE_EVERY": 1,
    "DATA.IMAGE_SIZE": 1,
    "DATA.NUM_CLASSES": 0,
    "DATA.TRAIN_IMAGES": 0,
    "DATA.HOLDOUT": 0,
    "DATA.CROP_PADDING": 0,
    "DATA.MEMORY_GB": 0,
    "DATA.WORKERS": 0,
    "DATA.RESIZE": 0,
    "DISTILL.WARMUP": 0,
    "TEACHER.ACCURACY": 0,
    "SEED": 0,
    "DATA.SPLIT_SEED": 0,
    "TEACHER.SEED": 0,
    "TEACHER.EPOCHS": 1,
    "SOLVER.EPOCHS": 1,
    "SOLVER.BATCH_SIZE": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.GAMMA": 0,
    "SOLVER.WARMUP_EPOCHS": 0,
}
MOST = {
    "DISTILL.WARMUP": 1,  # a share of the epochs
    "TEACHER.ACCURACY": 100,
    "SOLVER.MOMENTUM": 1,
    "SEED": 2**64 - 1,  # of torch's generators
    "TEACHER.SEED": 2**64 - 1,
    "DATA.SPLIT_SEED": 2**32 - 1,  # of numpy's legacy generator
}


def _check(cfg: CfgNode) -> None:
    values = flatten(cfg)
    _check_ranges(values)
    if not cfg.OUTPUT_DIR:
        raise ConfigError("OUTPUT_DIR: expected the path of a folder, got an empty one")
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ConfigError("SOLVER.NESTEROV: needs a SOLVER.MOMENTUM above 0, got 0")
    if cfg.DATA.CROP_PADDING > 4 * cfg.DATA.IMAGE_SIZE:
        raise ConfigError(
            f"DATA.CROP_PADDING: expected at most {4 * cfg.DATA.IMAGE_SIZE}, four times "
            f"DATA.IMAGE_SIZE, got {cfg.DATA.CROP_PADDING}"
        )
    if min(cfg.SOLVER.MILESTONES, default=1) < 1:
        raise ConfigError(
            f"SOLVER.MILESTONES: expected epochs, at least 1, got {cfg.SOLVER.MILESTONES}"
        )
    for role in ("STUDENT", "TEACHER"):
        mean, std = cfg[role].PIXEL_MEAN, cfg[role].PIXEL_STD
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                f"{role}.PIXEL_MEAN and {role}.PIXEL_STD: expected three numbers each (R, G, B), "
                f"deviations above 0, got {mean} and {std}"
            )
    if not cfg.STUDENT.NAME:
        raise ConfigError("STUDENT.NAME: expected the name of a model, got an empty one")
    if not cfg.DISTILL.METHODS:
        raise ConfigError("DISTILL.METHODS: expected one or more losses, got none")
    check_methods(cfg.DISTILL.METHODS)


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            # Infinite memory is no limit; elsewhere neither is a number to compute with.
            if isinstance(number, float) and not math.isfinite(number):
                if key == "DATA.MEMORY_GB" and number > 0:
                    continue
                raise ConfigError(f"{key}: expected a finite number, got {value}")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise ConfigError(f"{key}: expected one of {', '.join(allowed)}, got {values[key]!r}")
    for key, least in LEAST.items():
        if values[key] < least:
            raise ConfigError(f"{key}: expected at least {least}, got {values[key]}")
    for key, most in MOST.items():
        if values[key] > most:
            raise ConfigError(f"{key}: expected at most {most}, got {values[key]}")
