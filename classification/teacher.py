"""The teacher: from a file, or from its own training run."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from classification.config import config_from_text, default_config, teacher_name, teachers_of
from classification.data import ImageSet, pixel_statistics
from classification.evaluation import accuracy, is_guessing
from classification.models import Classifier, has_own_weights, model_of
from classification.models.taps import with_stages
from classification.preflight import check_logits
from pcka.distributed import from_first_process, rank, world_size
from pcka.engine.config import ConfigError, flatten
from pcka.engine.distill import add_sections, changed_settings
from pcka.engine.folder_lock import FolderInUseError, lock_folder
from pcka.engine.run_folder import remove_temporaries
from pcka.files import atomic_save, load_file
from pcka.teacher import FrozenTeacher

if TYPE_CHECKING:
    from classification.teacher_outputs import KeptOutputs

logger = logging.getLogger("pcka")

PREFLIGHT_POINTS = 2.0  # how far a teacher may fall short of its stated accuracy
HASHED = 12  # hash digits in the names of kept teachers
WAITING_SECONDS = 2.0  # between checks whether another run has trained the teacher

ImageSets = tuple[ImageSet, ImageSet]

# What training with cross-entropy depends on, besides its images.
DETERMINING = (
    "SEED", "CHANNELS_LAST", "AUTOCAST", "DATA.CROP_PADDING", "DATA.FLIP", "DATA.RANDAUGMENT",
    "DATA.ERASING", "DATA.MIXUP", "DATA.CUTMIX",
)  # fmt: skip
DETERMINING_SECTIONS = ("STUDENT.", "SOLVER.")
# Those added later: at their defaults they are not hashed, so that older teachers are found.
SINCE = (
    "STUDENT.KWARGS", "STUDENT.LOGITS", "STUDENT.BN_MOMENTUM",
    "SOLVER.ACCUMULATE", "SOLVER.OPTIMIZER", "SOLVER.BETAS",
    "SOLVER.EPS", "SOLVER.DECAY_NORMS_AND_BIASES", "SOLVER.CLIP_GRADIENTS", "SOLVER.MIN_LR",
    "SOLVER.ONECYCLE_RISE", "SOLVER.ONECYCLE_DIV", "SOLVER.ONECYCLE_FINAL_DIV", "SOLVER.EMA_DECAY",
    "DATA.RANDAUGMENT", "DATA.ERASING", "DATA.MIXUP", "DATA.CUTMIX",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to teach.

    Attributes:
        model: on the training device, with its batch norms folded.
        accuracy: on the evaluation images, percent.
        norms: module path -> weight and bias, before folding, of the batch norms that give
            features before their activation.
        weights: by name, before folding.
        outputs: its outputs on disk; None if they are not kept.
    """

    model: FrozenTeacher
    accuracy: float
    norms: dict[str, tuple[Tensor, Tensor]]
    weights: dict[str, Tensor]
    outputs: KeptOutputs | None = None


def prepare_teacher(
    cfg: CfgNode,
    image_sets: ImageSets,
    train_run: Callable[[CfgNode, ImageSets], Path],
    tapped: Collection[str] = (),
) -> Teacher | None:
    """Return the teacher with its weights, or None if the configuration names none.

    Args:
        cfg: of the students.
        image_sets: training and evaluation images, on the training device.
        train_run: trains the teacher in its own run, if requested and not done yet, and returns
            its weights file.
        tapped: paths in the teacher that are read besides its stages.

    Raises:
        ConfigError: a teacher without weights, one that falls more than two points short of
            ``TEACHER.ACCURACY``, or a folder ``TEACHER.OUTPUTS`` of a different training.
    """
    if not cfg.TEACHER.NAME:
        return None
    train_set, evaluation_set = image_sets
    each = teachers_of(cfg)
    models = [_with_weights(one, image_sets, train_run) for one in each]
    if len(each) > 1:  # to show whether one is weak
        for one, member in zip(each, models, strict=True):
            _measured(one.TEACHER.NAME, member, one.TEACHER, evaluation_set)
    model = as_one(cfg, models)
    norms, weights, outputs = _preactivation_norms(model), model.state_dict(), None
    if cfg.TEACHER.OUTPUTS:
        from classification.teacher_outputs import open_outputs  # few runs keep any

        outputs = open_outputs(cfg, weights, train_set)
    stages = (*model.stage_names, *model.preactivation_names)
    frozen = FrozenTeacher(
        model,
        channels_last=cfg.CHANNELS_LAST,
        fold_batch_norm=True,
        tapped=[path for path in (*stages, *tapped) if path],
    )
    name = teacher_name(cfg)
    top1 = _measured(name, frozen, cfg.TEACHER, evaluation_set)
    stated = cfg.TEACHER.ACCURACY
    if top1 < stated - PREFLIGHT_POINTS:
        raise ConfigError(
            f"TEACHER.ACCURACY: {name} reaches {top1:.2f} % on the evaluation images, "
            f"{stated:.2f} % is stated; check TEACHER.WEIGHTS, TEACHER.PIXEL_MEAN and PIXEL_STD, "
            "and the data, or state its accuracy on these (0: any)"
        )
    return Teacher(frozen, top1, norms, weights, outputs)


def _with_weights(
    cfg: CfgNode, image_sets: ImageSets, train_run: Callable[[CfgNode, ImageSets], Path]
) -> Classifier:
    """Return one teacher on the training device, with its weights and stages."""
    weights = ""
    if is_trained(cfg.TEACHER):
        weights = str(_trained_teacher(cfg, image_sets, train_run))
    return _built(cfg, image_sets, weights)


def _built(cfg: CfgNode, image_sets: ImageSets, weights: str = "") -> Classifier:
    """Return one teacher on the training device, with its stages and, if any, these weights."""
    classes = len(image_sets[0].classes)
    model = model_of(cfg.TEACHER, classes, role="teacher", weights=weights)
    model = with_stages(model, cfg.DATA.IMAGE_SIZE).to(image_sets[1].device)
    check_logits(model, "teacher", cfg, classes)
    return model


def is_trained(section: CfgNode) -> bool:
    """Whether a teacher's weights come from its own training run."""
    return not section.WEIGHTS and (section.TRAIN or not has_own_weights(section))


def teacher_file(cfg: CfgNode, train_set: ImageSet) -> Path | None:
    """Return a teacher's weights file, existing or not, or None if its library has them."""
    if is_trained(cfg.TEACHER):
        return teacher_run(cfg, train_set)[1]
    return Path(cfg.TEACHER.WEIGHTS) if cfg.TEACHER.WEIGHTS else None


def _measured(name: str, model: nn.Module, section: CfgNode, data: ImageSet) -> float:
    """Measure and log a model's accuracy (percent) with the pixel statistics of a section."""
    top1 = accuracy(model, pixel_statistics(section).to(data.device), data)["top1"]
    logger.info("teacher %s: accuracy %.2f %%", name, top1)
    if is_guessing(top1, len(data.classes), len(data)):
        logger.warning(
            "teacher %s is at chance and has nothing to teach: check TEACHER.WEIGHTS, "
            "TEACHER.EPOCHS (if it is trained), TEACHER.PIXEL_MEAN and PIXEL_STD, and the data",
            name,
        )
    return top1


def as_one(cfg: CfgNode, models: Sequence[Classifier]) -> Classifier:
    """Return all teachers of :func:`classification.config.teachers_of` as one model."""
    if len(models) == 1:
        return models[0]
    from classification.teachers import joined

    return joined(cfg, models)


def _preactivation_norms(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    norms = {path: model.get_submodule(path) for path in model.preactivation_norms if path}
    return {path: (norm.weight.detach(), norm.bias.detach()) for path, norm in norms.items()}


def _trained_teacher(
    cfg: CfgNode, image_sets: ImageSets, train_run: Callable[[CfgNode, ImageSets], Path]
) -> Path:
    """Return the file of the finished teacher; train it, or resume its training, if it is missing.

    If several runs need the same teacher, one trains it and the others wait.
    """
    run, weights = teacher_run(cfg, image_sets[0])
    folder = Path(run.OUTPUT_DIR)
    if from_first_process(weights.exists()):
        logger.info("teacher %s: already trained, %s", cfg.TEACHER.NAME, weights)
    else:
        _built(cfg, image_sets)  # what its training would refuse is told by the teacher's keys
    told = False
    while not from_first_process(weights.exists()):
        if from_first_process(rank() == 0 and _is_in_use(folder)):
            if not told:
                logger.info(
                    "teacher %s: another run is training it in %s", cfg.TEACHER.NAME, folder
                )
            told = True
            time.sleep(WAITING_SECONDS)
            continue
        if not folder.exists() and (other := _nearest_kept(run, weights)):
            logger.info(
                "teacher %s: %s also exists and differs in %s; set TEACHER.WEIGHTS to use it as is",
                *(cfg.TEACHER.NAME, *other),
            )
        logger.info("teacher %s: training it in %s", cfg.TEACHER.NAME, folder)
        try:
            trained = train_run(run, image_sets)
        except FolderInUseError:
            if world_size() > 1:  # only the first process knows
                raise
            continue  # another run was quicker
        if rank() == 0:
            _keep(trained, weights)
    return weights


def _nearest_kept(run: CfgNode, weights: Path) -> tuple[Path, str] | None:
    """Return the kept teacher of this name with the fewest different settings, and these."""
    kept = []
    stem = glob.escape(weights.stem.rpartition("-")[0])
    for path in sorted(weights.parent.glob(f"{stem}-{'?' * HASHED}.pth")):
        config = path.with_suffix("") / "config.yaml"
        if not config.is_file():
            continue
        with suppress(ConfigError):  # of a version with other keys
            differing = changed_settings(config_from_text(config.read_text()), run)
            kept.append((path, list(filter(_determines, differing))))
    if not kept:
        return None
    path, keys = min(kept, key=lambda one: len(one[1]))
    return path, ", ".join(keys) or "its images"


def _determines(key: str) -> bool:
    """Whether a different value of a setting makes a different teacher."""
    return key in DETERMINING or key.startswith(DETERMINING_SECTIONS)


def _is_in_use(folder: Path) -> bool:
    try:
        os.close(lock_folder(folder))
    except FileNotFoundError:
        return False
    except FolderInUseError:
        return True
    return False


def _keep(trained: Path, weights: Path) -> None:
    """Copy the weights of a finished training to where runs look for them."""
    with suppress(FolderInUseError):  # another run is just doing the same
        handle = lock_folder(trained.parent)
        try:
            remove_temporaries(weights.parent, weights.name)
            atomic_save(load_file(trained), weights)
        except FileNotFoundError as error:
            raise ConfigError(
                f"TEACHER.CACHE_DIR: the teacher's finished training has lost its {trained}; "
                f"remove {str(trained.parent)!r} to train it again"
            ) from error
        finally:
            os.close(handle)


def check_teacher(cfg: CfgNode) -> None:
    """Refuse teachers whose weights are missing and that are not to be trained."""
    for teacher in [one.TEACHER for one in teachers_of(cfg) if one.TEACHER.NAME]:
        if not (teacher.WEIGHTS or has_own_weights(teacher) or teacher.TRAIN):
            raise ConfigError(
                f"TEACHER.WEIGHTS: the teacher {teacher.NAME!r} has no weights; give a checkpoint, "
                "or set TEACHER.TRAIN True to train it first (it is kept in TEACHER.CACHE_DIR)"
            )
        if teacher.WEIGHTS and not Path(teacher.WEIGHTS).is_file():
            raise ConfigError(f"TEACHER.WEIGHTS: there is no file {teacher.WEIGHTS!r}")


def teacher_run(cfg: CfgNode, train_set: ImageSet) -> tuple[CfgNode, Path]:
    """Return the configuration that trains the teacher, and the file for the finished weights.

    The teacher is the "student" of a run with cross-entropy alone. Folder and file are named by a
    hash of everything that determines the weights, including the training images.
    """
    run = default_config()
    silent = flatten(run)
    add_sections(run.DISTILL, run.DISTILL.METHODS)
    for key in (
        "DEVICE", "CHANNELS_LAST", "AUTOCAST", "CUDA_GRAPH", "LOG_EVERY", "SAVE_EVERY", "REPORT",
        "IMPORTS",
    ):  # fmt: skip
        run[key] = cfg[key]
    run.SEED = cfg.TEACHER.SEED
    run.DATA = cfg.DATA.clone()
    run.SOLVER = cfg.SOLVER.clone()
    run.defrost()
    run.SOLVER.EPOCHS = cfg.TEACHER.EPOCHS
    run.SOLVER.EMA_DECAY = 0.0  # it teaches with the trained weights, not an average
    for key in ("NAME", "KWARGS", "LOGITS", "BN_MOMENTUM", "PIXEL_MEAN", "PIXEL_STD"):
        run.STUDENT[key] = cfg.TEACHER[key]
    determining = {
        key: value
        for key, value in flatten(run).items()
        if _determines(key)
        if key not in SINCE or value != silent[key]
    }
    text = json.dumps([determining, train_set.fingerprint], sort_keys=True)
    model = cfg.TEACHER.NAME.removeprefix("hf/").strip("./~") or "model"  # stay within the folder
    name = f"{model}-{hashlib.sha256(text.encode()).hexdigest()[:HASHED]}"
    run.OUTPUT_DIR = str(Path(cfg.TEACHER.CACHE_DIR) / name)
    run.freeze()
    return run, Path(cfg.TEACHER.CACHE_DIR) / f"{name}.pth"
