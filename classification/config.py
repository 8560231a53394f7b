"""Reading a run's configuration: safe YAML, known keys only, values of the default's type."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from classification.defaults import default_config
from classification.yaml_files import YamlFileError, flatten, read_leaves
from pcka import losses

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


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


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
        _merge(cfg, of_method.items(), source=str(path))
    if config_file is not None:
        of_file = _read(config_file)
        if method:
            of_file.pop("DISTILL.METHODS", None)
            _refuse_saved(of_file, cfg, source=str(config_file))
        _merge(cfg, of_file.items(), source=str(config_file))
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides: expected pairs of KEY VALUE, got {len(overrides)} words: "
            f"{' '.join(overrides)!r}"
        )
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    _merge(cfg, pairs, source="the command line")
    _check(cfg)
    cfg.freeze()
    return cfg


def _refuse_saved(of_file: Mapping[str, object], cfg: CfgNode, source: str) -> None:
    """A run's ``config.yaml`` has every setting of every method: none would be left to a method."""
    if of_file.keys() >= flatten(cfg.DISTILL, "DISTILL.").keys() - {"DISTILL.METHODS"}:
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
        raise ConfigError(f"method: no method is called {method!r}; {_near(method, known)}")
    return known[method]


def method_files(config_file: str | Path | None = None) -> dict[str, Path]:
    """Return name -> file of all methods; those beside the configuration file come first."""
    folders = [CONFIGS] if config_file is None else [CONFIGS, Path(config_file).parent]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("methods/*.yaml"))}


def config_from_text(text: str) -> CfgNode:
    """Return the configuration that ``cfg.dump()`` wrote; keys that it lacks take their default."""
    cfg = default_config()
    _merge(cfg, flatten(yaml.safe_load(text)).items(), source="the saved configuration")
    return cfg


def set_key(cfg: CfgNode, key: str, value: object) -> None:
    """Set the leaf at a dotted key."""
    *sections, leaf = key.split(".")
    for section in sections:
        cfg = cfg[section]
    cfg[leaf] = value


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
    return [key for key in after if key not in harmless and before[key] != after[key]]


def _read(path: str | Path) -> dict[str, object]:
    try:
        return read_leaves(path)
    except YamlFileError as error:
        raise ConfigError(str(error)) from error


def _merge(cfg: CfgNode, pairs: Iterable[tuple[str, object]], source: str) -> None:
    known = flatten(cfg)
    for key, value in pairs:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}; {_near(key, known)}")
        set_key(cfg, key, _coerce(key, value, known[key], source))


def _near(word: str, known: Iterable[str]) -> str:
    """Say which known names the word may have meant: by its last part, or by spelling."""
    by_upper = {name.upper(): name for name in known}
    matches = [name for name in by_upper if name.endswith(word.upper().rpartition(".")[2])]
    matches += difflib.get_close_matches(word.upper(), by_upper, n=3)
    names = [by_upper[match] for match in dict.fromkeys(matches)]
    return f"{'near matches' if names else 'known'}: {', '.join(names or by_upper.values())}"


def _parse(text: str) -> object:
    """Read the value of a word: YAML first (``true``, ``[a, b]``), then Python (``1e-4``)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _coerce(key: str, value: object, default: object, source: str) -> object:
    """Return the value in the default's type; int serves for float, a tuple for a list."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _parse(value)
    if isinstance(default, list) and isinstance(value, list | tuple):
        return [_coerce(key, v, _item(key, v, default), source) if default else v for v in value]
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is None or type(value) is type(default):
        return value
    raise ConfigError(
        f"{source}: {key} expects a {type(default).__name__} (default {default!r}), got {value!r}"
    )


def _item(key: str, value: object, default: list) -> object:
    """The default of a list's item; a patch is a side or a pair of sides."""
    is_pair = key.endswith(".PATCH_SIZES") and isinstance(value, list | tuple)
    return default if is_pair else default[0]


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
    _check_methods(cfg.DISTILL.METHODS)


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


def _check_methods(methods: Sequence[str]) -> None:
    if not methods or len(set(methods)) != len(methods):
        raise ConfigError(
            f"DISTILL.METHODS: expected one or more losses, each named once, got {methods}"
        )
    for name in methods:
        if name not in losses.names():
            raise ConfigError(
                f"DISTILL.METHODS: no loss is called {name!r}; {_near(name, losses.names())}"
            )
