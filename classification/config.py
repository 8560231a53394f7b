"""A run's configuration: every key, its default and its meaning, and how files are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from classification.catalog import CONFIGS as CONFIGS  # re-exported
from classification.catalog import method_files
from classification.data import check_name
from classification.solver import check_dot, check_solver
from pcka import losses
from pcka.engine.config import (
    ConfigError,
    flatten,
    near_names,
    pairs_of,
    read_leaves,
)
from pcka.engine.distill import changed_settings, check_methods, merge_settings

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def default_config() -> CfgNode:
    """Return a fresh tree of all keys with their defaults.

    The sections ``DISTILL.<NAME>`` are added by :func:`pcka.engine.distill.merge_settings`.
    """
    cfg = CfgNode(
        {
            "SEED": 0,  # seed of initialisation, data order and augmentation
            "IMPORTS": [],  # modules that register your own parts; lists of all files add up
            "OUTPUT_DIR": "output/run",  # folder for everything that a run writes
            "DEVICE": "auto",  # auto (CUDA if available) | cpu | cuda
            "CHANNELS_LAST": False,  # memory format of images, student and teacher
            "AUTOCAST": "",  # "" (float32) | bfloat16 | auto: bfloat16 if the hardware supports it
            "COMPILE": False,  # torch.compile both models: takes minutes at the start, faster steps
            "CUDA_GRAPH": True,  # CUDA: record the step once and replay it, where possible
            "LOG_EVERY": 20,  # steps between reads of the losses (each one synchronises)
            "EVAL_EVERY": 1,  # epochs between evaluations; the last epoch is always evaluated
            "GRADIENTS_EVERY": 0,  # epochs between measurements of each term's gradient; 0: never
            "SAVE_EVERY": 1,  # epochs between checkpoints to resume from
            "KEEP_EVERY": 0,  # epochs between students that are kept, epochs/0000.pth, ...; 0: none
            "REPORT": True,  # write report.html and report.json at the end of a run
        }
    )
    cfg.DATA = CfgNode(
        {
            "NAME": "",  # folder | table | webdataset | huggingface | cifar10 | cifar100 | digits
            "ROOT": "data",  # folder of the data; digits needs none
            "TRAIN_PART": "",  # file, shards or split to train on; "": the default (docs/data.md)
            "TEST_PART": "",  # file, shards or split to evaluate on; "": the default
            "IMAGE_COLUMN": "",  # table (default: path), huggingface (default: the image column)
            "LABEL_COLUMN": "",  # likewise (label; the class column); webdataset: field of .json
            "NUM_CLASSES": 0,  # 0: taken from the data; any other count must match it
            "IMAGE_SIZE": 32,  # side of the square images, pixels
            "TRAIN_IMAGES": 0,  # 0: all; otherwise a class-balanced subset of this size
            "HOLDOUT": 0,  # > 0: this many training images are held out for evaluation (tuning)
            "SPLIT_SEED": 0,  # seed of the choice of HOLDOUT and TRAIN_IMAGES, independent of SEED
            "CROP_PADDING": 4,  # zero padding of the random crop, pixels; 0: none (not for STREAM)
            "FLIP": True,  # random horizontal flip
            "RANDAUGMENT": [],  # [operations, magnitude 0 to 30], e.g. [2, 9]; []: none
            "ERASING": 0.0,  # probability that a random box of an image is erased
            "MIXUP": 0.0,  # > 0: pairs of images are blended, weights from Beta(MIXUP, MIXUP)
            "CUTMIX": 0.0,  # as MIXUP, by pasting a box; with both, each batch uses one of the two
            "DOWNLOAD": False,  # cifar10 and cifar100: download what is missing
            "MEMORY_GB": 8.0,  # images are held in memory as uint8; a larger set is refused
            "STREAM": False,  # read image files batch by batch, with RandomResizedCrop
            "WORKERS": 4,  # STREAM: decoding processes per training process; 0: it decodes itself
            "RESIZE": 0,  # evaluating image files: shorter side before the crop; 0: IMAGE_SIZE
        }
    )
    cfg.STUDENT = CfgNode(
        {
            "NAME": "",  # built-in | torchvision/N | timm/N | hf/FOLDER | package.module:factory
            "KWARGS": CfgNode(),  # keyword arguments of the model's constructor, besides classes
            "LOGITS": "",  # key of the logits in the model's output; "": found automatically
            "WEIGHTS": "",  # checkpoint to start from; "": random initialisation from SEED
            "BN_MOMENTUM": 0.0,  # weight of a batch in batch norm's statistics; 0: the model's own
            "PIXEL_MEAN": IMAGENET_MEAN,  # of the student's input, for pixels in [0, 1]
            "PIXEL_STD": IMAGENET_STD,  # standard deviation of each channel
        }
    )
    cfg.TEACHER = CfgNode(
        {
            "NAME": "",  # as for the student; "": no teacher
            "KWARGS": CfgNode(),  # as for the student
            "LOGITS": "",  # as for the student
            "WEIGHTS": "",  # the teacher's checkpoint
            "BN_MOMENTUM": 0.0,  # of its training, as for the student
            "PIXEL_MEAN": IMAGENET_MEAN,  # the teacher's own pixel statistics
            "PIXEL_STD": IMAGENET_STD,  # standard deviation of each channel
            "ACCURACY": 0.0,  # expected, percent; the run stops if over 2 points below it
            "TRAIN": False,  # with empty WEIGHTS: train the teacher first (CE), keep it for reuse
            "EPOCHS": 240,  # epochs of that training; everything else as in SOLVER
            "SEED": 0,  # seed of that training, so that runs with different SEEDs share a teacher
            "CACHE_DIR": "output/teachers",  # trained teachers, named by a digest of their settings
            "OTHERS": [],  # further teachers: mappings of keys of this section, at least NAME
            "SHARES": [],  # weight of each teacher in the mean of their logits; []: equal
            "OUTPUTS": "",  # folder where its outputs are kept for later runs; "": none
            "OUTPUTS_GB": 50.0,  # a run whose outputs would take more is refused
        }
    )
    cfg.SOLVER = CfgNode(
        {
            "EPOCHS": 240,  # passes over the training images
            "BATCH_SIZE": 64,  # an incomplete last batch of an epoch is dropped
            "ACCUMULATE": 1,  # batches per update (mean gradient); losses see one batch at a time
            "OPTIMIZER": "sgd",  # sgd | adamw
            "BASE_LR": 0.05,  # peak learning rate
            "MOMENTUM": 0.9,  # sgd
            "NESTEROV": False,  # sgd
            "BETAS": [0.9, 0.999],  # adamw: decay of the averages of the gradient and its square
            "EPS": 1e-8,  # adamw: added to the root of the averaged square
            "WEIGHT_DECAY": 5e-4,  # sgd: added to the gradient; adamw: decoupled, times the rate
            "DECAY_NORMS_AND_BIASES": True,  # False: no decay of one-dimensional parameters
            "CLIP_GRADIENTS": 0.0,  # maximum norm of the whole gradient; 0: no clipping
            "SCHEDULE": "multistep",  # multistep | cosine | onecycle; applied at every update
            "MILESTONES": [150, 180, 210],  # epochs after which GAMMA multiplies the learning rate
            "GAMMA": 0.1,  # see MILESTONES
            "MIN_LR": 0.0,  # cosine: the final learning rate
            "WARMUP_EPOCHS": 0.0,  # the learning rate rises linearly from 0 over these epochs
            "ONECYCLE_RISE": 0.3,  # onecycle: share of EPOCHS in which the learning rate rises
            "ONECYCLE_DIV": 25.0,  # onecycle: the initial learning rate is BASE_LR over this
            "ONECYCLE_FINAL_DIV": 1e4,  # onecycle: the final learning rate is that over this
            "EMA_DECAY": 0.0,  # decay of a moving average of the student's weights; 0: none
        }
    )
    cfg.DISTILL = CfgNode(
        {
            "METHODS": ["CE"],  # the losses that are summed
            "WARMUP": 0.0,  # share of EPOCHS over which the terms that need the teacher rise from 0
            "RELATIVE": False,  # scale each of these terms to cross-entropy's value, then weight it
            "INHERIT": [],  # prefixes of the teacher's weights that the student starts from
            "DOT_DELTA": 0.0,  # SGD's momentum: minus this for the task, plus it for the teacher
            "TAPS": [],  # [name, student's module path, teacher's], besides the models' own stages
        }
    )
    return cfg


# Steps of the paper's runs on CIFAR-100: 240 epochs of 781 batches.
RCKA_STEPS = 187_440

# Taps that matter even if no loss reads them: stages, and a model's built-in taps.
STAGE_TAP = re.compile(r"(stage\d+|last)(_preact)?|pooled")

ADAMW_LR = 0.01  # a higher rate is probably a mistake

# Keys that may differ between a run and its continuation: they do not affect the training.
# (A different DATA.ROOT must hold the same images: the checkpoint stores their fingerprint.)
HARMLESS_KEYS = (
    "OUTPUT_DIR",
    "LOG_EVERY",
    "SAVE_EVERY",
    "KEEP_EVERY",
    "REPORT",
    "GRADIENTS_EVERY",
    "CUDA_GRAPH",
    "DATA.ROOT",
    "DATA.DOWNLOAD",
    "DATA.MEMORY_GB",
    "DATA.WORKERS",
    "TEACHER.CACHE_DIR",
    "TEACHER.ACCURACY",
    "TEACHER.OUTPUTS",
    "TEACHER.OUTPUTS_GB",
)


def load_config(
    config_file: str | Path | Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
    method: str = "",
) -> CfgNode:
    """Return the frozen configuration: defaults, the file (and its ``_BASE_``), overrides.

    Args:
        config_file: YAML file of plain values (tags that would run code are refused), or its values
            by dotted keys.
        method: name of a file in the folder ``methods`` beside the configuration file, or else in
            ``configs/classification/methods``. It determines which losses are summed, overriding
            the configuration file, and their settings, unless the configuration file sets them.
        overrides: ``KEY VALUE`` pairs of the command line, e.g. ``["SOLVER.EPOCHS", "8"]``.

    Raises:
        ConfigError: unreadable file, unknown key (near matches are named), a value whose type
            differs from the default's, or contradictory values.
    """
    cfg = default_config()
    proposed = config_file if isinstance(config_file, Mapping) else {}
    path = None if isinstance(config_file, Mapping) else config_file
    if method:
        of_method = method_file(method, path)
        merge_settings(cfg, read_leaves(of_method), str(of_method))
    if path is not None:
        of_file = read_leaves(path)
        if method:
            of_file.pop("DISTILL.METHODS", None)
            _refuse_saved(of_file, source=str(path))
        merge_settings(cfg, of_file, str(path))
    merge_settings(cfg, proposed, "the proposed settings")
    merge_settings(cfg, dict(pairs_of(overrides)), "the command line")
    _check(cfg)
    cfg.freeze()
    return cfg


def _refuse_saved(of_file: Mapping[str, object], source: str) -> None:
    """Refuse a run's ``config.yaml``: it sets every key and would leave nothing to a method."""
    everything = flatten(default_config())
    if of_file.keys() >= {key for key in everything if key.startswith(("SOLVER.", "DATA."))}:
        raise ConfigError(
            f"{source}: is the saved configuration of a run and would override the method's "
            "settings; give the pair's file, or omit the method"
        )


def method_file(method: str, config_file: str | Path | None = None) -> Path:
    """Return the file of a method for a configuration file.

    Raises:
        ConfigError: there is no such method; near matches, or else all methods, are named.
    """
    known = method_files(config_file)
    if method not in known:
        raise ConfigError(f"method: unknown method {method!r}; {near_names(method, known)}")
    return known[method]


def config_from_text(text: str) -> CfgNode:
    """Return the configuration that ``cfg.dump()`` wrote; missing keys take their default."""
    cfg = default_config()
    merge_settings(cfg, flatten(yaml.safe_load(text)), "the saved configuration")
    return cfg


def changed_keys(old: CfgNode, new: CfgNode) -> list[str]:
    """Return the keys in which a continuation would differ from the run that it continues.

    A different SOLVER.EPOCHS is harmless under a multistep schedule, whose rates do not depend on
    it; under any other, or with a distillation warm-up, it would change what was trained.
    """
    harmless = set(HARMLESS_KEYS)
    # A run may end after fewer epochs only if every epoch was evaluated.
    evaluated = new.EVAL_EVERY == 1 or new.SOLVER.EPOCHS >= old.SOLVER.EPOCHS
    if new.SOLVER.SCHEDULE == "multistep" and not new.DISTILL.WARMUP and evaluated:
        harmless.add("SOLVER.EPOCHS")
    return [key for key in changed_settings(old, new) if key not in harmless]


CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "AUTOCAST": ("", "bfloat16", "auto"),
    "SOLVER.OPTIMIZER": ("sgd", "adamw"),
    "SOLVER.SCHEDULE": ("multistep", "cosine", "onecycle"),
}
# Key -> minimum and maximum; None: unbounded.
RANGES: dict[str, tuple[float, float | None]] = {
    "LOG_EVERY": (1, None),
    "EVAL_EVERY": (1, None),
    "GRADIENTS_EVERY": (0, None),
    "SAVE_EVERY": (1, None),
    "KEEP_EVERY": (0, None),
    "SEED": (0, 2**64 - 1),  # of torch's generators
    "DATA.IMAGE_SIZE": (1, None),
    "DATA.NUM_CLASSES": (0, None),
    "DATA.TRAIN_IMAGES": (0, None),
    "DATA.HOLDOUT": (0, None),
    "DATA.SPLIT_SEED": (0, 2**32 - 1),  # of numpy's legacy generator
    "DATA.CROP_PADDING": (0, None),
    "DATA.ERASING": (0, 1),
    "DATA.MIXUP": (0, None),
    "DATA.CUTMIX": (0, None),
    "DATA.MEMORY_GB": (0, None),
    "DATA.WORKERS": (0, None),
    "DATA.RESIZE": (0, None),
    "DISTILL.WARMUP": (0, 1),  # a share of the epochs
    "STUDENT.BN_MOMENTUM": (0, 1),
    "TEACHER.BN_MOMENTUM": (0, 1),
    "DISTILL.DOT_DELTA": (0, 1),
    "TEACHER.ACCURACY": (0, 100),
    "TEACHER.OUTPUTS_GB": (0, None),
    "TEACHER.SEED": (0, 2**64 - 1),
    "TEACHER.EPOCHS": (1, None),
    "SOLVER.EPOCHS": (1, None),
    "SOLVER.BATCH_SIZE": (1, None),
    "SOLVER.BASE_LR": (0, None),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, None),
    "SOLVER.ACCUMULATE": (1, None),
    "SOLVER.EPS": (0, None),
    "SOLVER.CLIP_GRADIENTS": (0, None),
    "SOLVER.GAMMA": (0, None),
    "SOLVER.MIN_LR": (0, None),
    "SOLVER.ONECYCLE_RISE": (0, 1),
    "SOLVER.ONECYCLE_DIV": (1, None),
    "SOLVER.ONECYCLE_FINAL_DIV": (1, None),
    "SOLVER.EMA_DECAY": (0, 1),
    "SOLVER.WARMUP_EPOCHS": (0, None),
}
OF_OTHER = re.compile(r"\.OTHERS\[\d+\]")  # in a further teacher's keys: the ranges are the first's


def doubts(cfg: CfgNode, steps: int) -> Iterator[str]:
    """Yield warnings about probable mistakes in a run of ``steps`` updates, 1-2 sentences each."""
    solver, distill = cfg.SOLVER, cfg.DISTILL
    unreached = [str(m) for m in solver.MILESTONES if m >= solver.EPOCHS]
    if unreached and solver.SCHEDULE == "multistep":
        yield (
            f"SOLVER.MILESTONES: the rate does not fall at {', '.join(unreached)}, beyond "
            f"SOLVER.EPOCHS {solver.EPOCHS}"
        )
    if solver.OPTIMIZER == "adamw" and solver.BASE_LR > ADAMW_LR:
        yield (
            f"SOLVER.BASE_LR: {solver.BASE_LR:g} is a rate for sgd; adamw usually needs 0.0005 to "
            "0.005"
        )
    yield from _without_effect(cfg)
    if "RCKA" not in distill.METHODS or steps >= RCKA_STEPS / 4:
        return
    rcka, task = distill.RCKA, distill.CE.WEIGHT if "CE" in distill.METHODS else 0.0
    weight = max(rcka.FEATURE_WEIGHTS) + rcka.INTRA_WEIGHT + rcka.INTER_WEIGHT
    if weight > 10 * task:
        yield (
            f"DISTILL.RCKA: weights of {weight:g} with {task:g} for cross-entropy are meant for "
            f"trainings like the paper's, of {RCKA_STEPS:,} steps; in {steps:,} a student may "
            "learn less than from cross-entropy alone (docs/results.md). Use the method "
            "dist_fitnet_fcka or rcka_short"
        )


def _without_effect(cfg: CfgNode) -> Iterator[str]:
    """Yield warnings about settings that have no effect because of others."""
    solver, distill = cfg.SOLVER, cfg.DISTILL
    reasons = {
        "SOLVER.NESTEROV": ("is for sgd", solver.NESTEROV and solver.OPTIMIZER != "sgd"),
        "SOLVER.MIN_LR": ("is for cosine", solver.MIN_LR and solver.SCHEDULE != "cosine"),
    }
    if not any(losses.find(name).needs_teacher for name in distill.METHODS):
        for key in ("WARMUP", "RELATIVE", "DOT_DELTA"):
            reasons[f"DISTILL.{key}"] = ("is for losses that need a teacher", distill[key])
    for key, (reason, without) in reasons.items():
        if without:
            yield f"{key}: has no effect here; it {reason}"
    own = [name for name, *_ in distill.TAPS if not STAGE_TAP.fullmatch(str(name))]
    read = {word for name in distill.METHODS for word in _words(distill.get(name, {}))}
    if unread := [str(name) for name in own if name not in read]:
        yield (
            f"DISTILL.TAPS: no loss reads {', '.join(unread)}; name it in the STAGES of one, as in "
            f'DISTILL.FCKA.STAGES "[{unread[0]}]"'
        )


def _words(settings: Mapping[str, object]) -> Iterator[object]:
    """Yield all values of a loss's section, with lists flattened."""
    for value in settings.values():
        yield from value if isinstance(value, list | tuple) else [value]


def _check(cfg: CfgNode) -> None:
    others = {f"TEACHER.OTHERS[{i}]": one.TEACHER for i, one in enumerate(teachers_of(cfg)[1:])}
    _check_ranges(flatten(cfg) | flatten(others))
    check_name(cfg.DATA.NAME)
    if not cfg.OUTPUT_DIR:
        raise ConfigError("OUTPUT_DIR: expected the path of a folder, got an empty one")
    check_solver(cfg.SOLVER)
    if cfg.DISTILL.DOT_DELTA:
        check_dot(cfg.SOLVER, cfg.DISTILL.DOT_DELTA)
    if (padding := cfg.DATA.CROP_PADDING) > (most := 4 * cfg.DATA.IMAGE_SIZE):
        raise ConfigError(
            f"DATA.CROP_PADDING: expected at most {most}, four times DATA.IMAGE_SIZE, got {padding}"
        )
    if (augment := cfg.DATA.RANDAUGMENT) and not _is_rand_augment(augment):
        raise ConfigError(
            "DATA.RANDAUGMENT: expected [operations, magnitude], at least 1 and 0 to 30, such as "
            f"[2, 9], or [] for none, got {augment}"
        )
    sections = {"STUDENT": cfg.STUDENT, "TEACHER": cfg.TEACHER, **others}
    for role, section in sections.items():
        mean, std = section.PIXEL_MEAN, section.PIXEL_STD
        if not are_statistics(mean, std):
            raise ConfigError(
                f"{role}.PIXEL_MEAN and {role}.PIXEL_STD: expected three numbers each (R, G, B), "
                f"deviations above 0, got {mean} and {std}"
            )
    if not cfg.STUDENT.NAME:
        raise ConfigError("STUDENT.NAME: expected the name of a model, got an empty one")
    if not cfg.DISTILL.METHODS:
        raise ConfigError("DISTILL.METHODS: expected one or more losses, got none")
    check_methods(cfg.DISTILL.METHODS)
    if cfg.DISTILL.INHERIT:
        from pcka.engine.inherit import check_prefixes  # few runs inherit

        check_prefixes(cfg.DISTILL.INHERIT)
    if cfg.DISTILL.RELATIVE and "CE" not in cfg.DISTILL.METHODS:
        raise ConfigError("DISTILL.RELATIVE: needs CE among DISTILL.METHODS; add it, or set False")


def are_statistics(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether pixels can be normalised with these means and deviations of R, G and B."""
    finite = all(map(math.isfinite, (*mean, *std)))
    return finite and len(mean) == len(std) == 3 and min(std) > 0


def _is_rand_augment(value: Sequence[Any]) -> bool:
    if [type(number) for number in value] != [int, int]:
        return False
    return value[0] >= 1 and 0 <= value[1] <= 30


def _check_ranges(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            # Infinite memory means no limit; otherwise NaN and infinity cannot be computed with.
            if isinstance(number, float) and not math.isfinite(number):
                if key == "DATA.MEMORY_GB" and number > 0:
                    continue
                raise ConfigError(f"{key}: expected a finite number, got {value}")
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise ConfigError(f"{key}: expected one of {', '.join(allowed)}, got {values[key]!r}")
    for key, value in values.items():
        if (of_all := OF_OTHER.sub("", key)) not in RANGES:
            continue
        least, most = RANGES[of_all]
        if value < least:
            raise ConfigError(f"{key}: expected at least {least}, got {value}")
        if most is not None and value > most:
            raise ConfigError(f"{key}: expected at most {most}, got {value}")


def teachers_of(cfg: CfgNode) -> list[CfgNode]:
    """Return one configuration per teacher, see :func:`classification.teachers.each_teacher`."""
    if not cfg.TEACHER.OTHERS and not cfg.TEACHER.SHARES:
        return [cfg]
    from classification.teachers import each_teacher  # most runs have one teacher

    return each_teacher(cfg)


def teacher_name(cfg: CfgNode) -> str:
    """Return the teacher's name, or the names of all teachers."""
    return " + ".join([cfg.TEACHER.NAME, *(other["NAME"] for other in cfg.TEACHER.OTHERS)])
