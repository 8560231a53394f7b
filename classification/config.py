"""A run's configuration: every key, its default and its meaning, and how files are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from fvcore.common.config import CfgNode

from classification.data import check_name
from pcka.engine.config import (
    ConfigError,
    flatten,
    near_names,
    pairs_of,
    read_leaves,
)
from pcka.engine.distill import changed_settings, check_methods, merge_settings

CONFIGS = Path(__file__).parents[1] / "configs" / "classification"

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def default_config() -> CfgNode:
    """Return a fresh tree of all keys with their defaults.

    The sections ``DISTILL.<NAME>`` come in by :func:`pcka.engine.distill.merge_settings`.
    """
    cfg = CfgNode(
        {
            "SEED": 0,  # of the student's start, the image order and the augmentation
            "IMPORTS": [],  # modules that register parts of your own; those of all files add up
            "OUTPUT_DIR": "output/run",  # everything that a run writes lies in this folder
            "DEVICE": "auto",  # auto (CUDA where there is one) | cpu | cuda
            "CHANNELS_LAST": False,  # memory format of images, student and teacher
            "AUTOCAST": "",  # "" (float32) | bfloat16 | auto: bfloat16 where the hardware has it
            "COMPILE": False,  # torch.compile of both models: minutes at the start, faster steps
            "CUDA_GRAPH": True,  # CUDA: record the step once and replay it, where it can be
            "LOG_EVERY": 20,  # steps between two reads of the losses (each one a synchronisation)
            "EVAL_EVERY": 1,  # epochs between two evaluations; the last epoch has one
            "GRADIENTS_EVERY": 0,  # epochs between looks at each term's gradient; likewise; 0: none
            "SAVE_EVERY": 1,  # epochs between two checkpoints to resume from; likewise
        }
    )
    cfg.DATA = CfgNode(
        {
            "NAME": "",  # digits | folder | cifar10 | cifar100
            "ROOT": "data",  # folder of the images; digits needs none
            "NUM_CLASSES": 0,  # 0: as many as the data has; another count is refused
            "IMAGE_SIZE": 32,  # side of the square images, pixels
            "TRAIN_IMAGES": 0,  # 0: all; else a class-balanced subset of this many
            "HOLDOUT": 0,  # > 0: this many training images are held out and evaluated on (tuning)
            "SPLIT_SEED": 0,  # of the choice of HOLDOUT and TRAIN_IMAGES, apart from SEED
            "CROP_PADDING": 4,  # zero padding of the random crop, pixels; 0: none (not for STREAM)
            "FLIP": True,  # random horizontal flip
            "DOWNLOAD": False,  # cifar10 and cifar100: fetch what is missing
            "MEMORY_GB": 8.0,  # images are resident as uint8; a larger set is refused
            "STREAM": False,  # read the files of a folder batch by batch; RandomResizedCrop
            "WORKERS": 4,  # STREAM: decoding processes of each training process; 0: itself
            "RESIZE": 0,  # evaluating a folder: shorter side before the crop; 0: IMAGE_SIZE
        }
    )
    cfg.STUDENT = CfgNode(
        {
            "NAME": "",  # zoo's name | torchvision/N | timm/N | hf/FOLDER | package.module:factory
            "KWARGS": CfgNode(),  # keywords of the model's constructor, beside the classes
            "LOGITS": "",  # key of the logits in what the model returns; "": found by themselves
            "WEIGHTS": "",  # checkpoint to start from; "": a random start from SEED
            "PIXEL_MEAN": IMAGENET_MEAN,  # of the student's input, for pixels in [0, 1]
            "PIXEL_STD": IMAGENET_STD,
        }
    )
    cfg.TEACHER = CfgNode(
        {
            "NAME": "",  # likewise; "": no teacher
            "KWARGS": CfgNode(),
            "LOGITS": "",
            "WEIGHTS": "",  # the teacher's checkpoint
            "PIXEL_MEAN": IMAGENET_MEAN,  # the teacher's own pixel statistics
            "PIXEL_STD": IMAGENET_STD,
            "ACCURACY": 0.0,  # on the evaluation images, percent; one 2 points worse stops the run
            "TRAIN": False,  # with empty WEIGHTS: train the teacher first (CE), keep it for reuse
            "EPOCHS": 240,  # of that training; all else as in SOLVER
            "SEED": 0,  # of that training, so that runs of several SEEDs share a teacher
            "CACHE_DIR": "output/teachers",  # trained teachers, named by what determines them
        }
    )
    cfg.SOLVER = CfgNode(
        {
            "EPOCHS": 240,
            "BATCH_SIZE": 64,  # an incomplete last batch of an epoch is left out
            "BASE_LR": 0.05,
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "WEIGHT_DECAY": 5e-4,
            "SCHEDULE": "multistep",  # multistep | cosine (to 0 at EPOCHS); set at every step
            "MILESTONES": [150, 180, 210],  # epochs after which the rate is multiplied by GAMMA
            "GAMMA": 0.1,
            "WARMUP_EPOCHS": 0.0,  # the rate rises linearly from 0 over these epochs
        }
    )
    cfg.DISTILL = CfgNode(
        {
            "METHODS": ["CE"],  # the losses that are summed
            "WARMUP": 0.0,  # share of EPOCHS over which the terms that need the teacher rise from 0
            "DOT_DELTA": 0.0,  # SGD's momentum: less by this for the task, more for the teacher's
            "TAPS": [],  # [name, student's module path, teacher's], beside the models' own stages
        }
    )
    return cfg


# Steps of the paper's trainings on CIFAR-100: 240 epochs of 781 batches.
RCKA_STEPS = 187_440

# Keys that may differ between a run and its continuation: they change nothing that is computed.
# (Another DATA.ROOT must hold the same images: the checkpoint knows their fingerprint.)
HARMLESS_KEYS = (
    "OUTPUT_DIR",
    "LOG_EVERY",
    "SAVE_EVERY",
    "GRADIENTS_EVERY",
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
        merge_settings(cfg, read_leaves(path), str(path))
    if config_file is not None:
        of_file = read_leaves(config_file)
        if method:
            of_file.pop("DISTILL.METHODS", None)
            _refuse_saved(of_file, source=str(config_file))
        merge_settings(cfg, of_file, str(config_file))
    merge_settings(cfg, dict(pairs_of(overrides)), "the command line")
    _check(cfg)
    cfg.freeze()
    return cfg


def _refuse_saved(of_file: Mapping[str, object], source: str) -> None:
    """A run's ``config.yaml`` says everything, and would leave nothing to a method."""
    everything = flatten(default_config())
    if of_file.keys() >= {key for key in everything if key.startswith(("SOLVER.", "DATA."))}:
        raise ConfigError(
            f"{source}: is the saved configuration of a run, and would leave nothing to the "
            "method; give the file of the pair, or leave the method out"
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
    merge_settings(cfg, flatten(yaml.safe_load(text)), "the saved configuration")
    return cfg


def changed_keys(old: CfgNode, new: CfgNode) -> list[str]:
    """Return the keys in which a continuation would differ from the run that it continues.

    Other SOLVER.EPOCHS are harmless under a multistep schedule, whose rates do not depend on them;
    under a cosine, or with a warm-up of the distillation, they would change what was trained.
    """
    harmless = set(HARMLESS_KEYS)
    # A run may end after fewer epochs only where each one was evaluated.
    evaluated = new.EVAL_EVERY == 1 or new.SOLVER.EPOCHS >= old.SOLVER.EPOCHS
    if new.SOLVER.SCHEDULE == "multistep" and not new.DISTILL.WARMUP and evaluated:
        harmless.add("SOLVER.EPOCHS")
    return [key for key in changed_settings(old, new) if key not in harmless]


CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "AUTOCAST": ("", "bfloat16", "auto"),
    "SOLVER.SCHEDULE": ("multistep", "cosine"),
}
# Key -> least and greatest value; None: no bound.
RANGES: dict[str, tuple[float, float | None]] = {
    "LOG_EVERY": (1, None),
    "EVAL_EVERY": (1, None),
    "GRADIENTS_EVERY": (0, None),
    "SAVE_EVERY": (1, None),
    "SEED": (0, 2**64 - 1),  # of torch's generators
    "DATA.IMAGE_SIZE": (1, None),
    "DATA.NUM_CLASSES": (0, None),
    "DATA.TRAIN_IMAGES": (0, None),
    "DATA.HOLDOUT": (0, None),
    "DATA.SPLIT_SEED": (0, 2**32 - 1),  # of numpy's legacy generator
    "DATA.CROP_PADDING": (0, None),
    "DATA.MEMORY_GB": (0, None),
    "DATA.WORKERS": (0, None),
    "DATA.RESIZE": (0, None),
    "DISTILL.WARMUP": (0, 1),  # a share of the epochs
    "DISTILL.DOT_DELTA": (0, 1),
    "TEACHER.ACCURACY": (0, 100),
    "TEACHER.SEED": (0, 2**64 - 1),
    "TEACHER.EPOCHS": (1, None),
    "SOLVER.EPOCHS": (1, None),
    "SOLVER.BATCH_SIZE": (1, None),
    "SOLVER.BASE_LR": (0, None),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, None),
    "SOLVER.GAMMA": (0, None),
    "SOLVER.WARMUP_EPOCHS": (0, None),
}


def doubts(cfg: CfgNode, steps: int) -> Iterator[str]:
    """Yield what of a training of so many steps is probably not meant, a sentence or two each."""
    solver, distill = cfg.SOLVER, cfg.DISTILL
    unreached = [str(m) for m in solver.MILESTONES if m >= solver.EPOCHS]
    if unreached and solver.SCHEDULE == "multistep":
        yield (
            f"SOLVER.MILESTONES: the rate does not fall at {', '.join(unreached)}, beyond "
            f"SOLVER.EPOCHS {solver.EPOCHS}"
        )
    if "RCKA" not in distill.METHODS or steps >= RCKA_STEPS / 4:
        return
    rcka, task = distill.RCKA, distill.CE.WEIGHT if "CE" in distill.METHODS else 0.0
    weight = max(rcka.FEATURE_WEIGHTS) + rcka.INTRA_WEIGHT + rcka.INTER_WEIGHT
    if weight > 10 * task:
        yield (
            f"DISTILL.RCKA: weights of {weight:g} beside {task:g} of cross-entropy are made for "
            f"trainings like the paper's, of {RCKA_STEPS:,} steps; in {steps:,} a student may "
            "learn less than from cross-entropy alone (docs/results.md). Take the method kd_fcka, "
            "or rcka_short"
        )


def _check(cfg: CfgNode) -> None:
    values = flatten(cfg)
    _check_ranges(values)
    check_name(cfg.DATA.NAME)
    if not cfg.OUTPUT_DIR:
        raise ConfigError("OUTPUT_DIR: expected the path of a folder, got an empty one")
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise ConfigError("SOLVER.NESTEROV: needs a SOLVER.MOMENTUM above 0, got 0")
    if delta := cfg.DISTILL.DOT_DELTA:
        if not delta <= cfg.SOLVER.MOMENTUM < 1 - delta:
            raise ConfigError(
                "DISTILL.DOT_DELTA: expected no more than SOLVER.MOMENTUM, and a sum of both below "
                f"1, got {delta} beside {cfg.SOLVER.MOMENTUM}"
            )
        if cfg.SOLVER.NESTEROV:
            raise ConfigError("DISTILL.DOT_DELTA: has no Nesterov form; set SOLVER.NESTEROV False")
    if (padding := cfg.DATA.CROP_PADDING) > (most := 4 * cfg.DATA.IMAGE_SIZE):
        raise ConfigError(
            f"DATA.CROP_PADDING: expected at most {most}, four times DATA.IMAGE_SIZE, got {padding}"
        )
    if min(milestones := cfg.SOLVER.MILESTONES, default=1) < 1:
        raise ConfigError(f"SOLVER.MILESTONES: expected epochs, at least 1, got {milestones}")
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
    for key, (least, most) in RANGES.items():
        if values[key] < least:
            raise ConfigError(f"{key}: expected at least {least}, got {values[key]}")
        if most is not None and values[key] > most:
            raise ConfigError(f"{key}: expected at most {most}, got {values[key]}")


def config_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of ``--config-file F [KEY VALUE ...]``; use ``parse_intermixed_args``.

    ``--list`` prints the configurations and methods that there are, and ends.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config-file", metavar="F", required=True, help="YAML configuration")
    parser.add_argument("--list", action=_List, help="print the configurations and methods")
    parser.add_argument(
        "overrides", metavar="KEY VALUE", nargs="*", help="keys that override the file's"
    )
    return parser


class _List(argparse.Action):
    """Prints the catalog and ends, as ``--help`` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(catalog())
        parser.exit()


def catalog() -> str:
    """Return the configuration files and the methods, a line each."""
    runs = sorted(
        path
        for path in CONFIGS.rglob("*.yaml")
        if path.parent != CONFIGS and path.parent.name != "methods" and path.stem != "base"
    )
    lines = ["Configurations (--config-file F):"]
    lines += [f"  configs/classification/{path.relative_to(CONFIGS)}" for path in runs]
    lines += ["", "Methods (--method M, on any of them):"]
    lines += [f"  {name:16s} {_headline(path)}" for name, path in method_files().items()]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")
