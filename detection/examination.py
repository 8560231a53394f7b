"""The doctor's checks of a detector's or segmenter's configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

import detection.meta_arch  # noqa: F401  (registers itself)
from detection.compat import open_loader
from detection.config import student_architecture, teacher_config
from detection.data import register_datasets
from detection.data.coco_file import first_names
from detection.data.mapper import make_mapper
from detection.data.register import class_count
from detection.data.targets import SEGMENTER, Entries, check_test_sets, training_set
from detection.meta_arch import DistilledDetector, has_head
from detection.pixel_checks import check_student, check_teacher_pixels
from detection.preflight import check_teacher_file, is_taught, read_run
from detection.run_state import lent_random_states
from detection.settings import traces_of_run
from detection.teacher import build_teacher
from detection.teacher_checks import check_features, check_teacher, objects_of
from detection.trainer import DetectionTrainer, student_of
from pcka.engine.config import ConfigError
from pcka.engine.doctor import (
    FAIL,
    PASS,
    SKIP,
    WARN,
    Check,
    Verdict,
    check_disk,
    needing,
    telling,
)
from pcka.engine.run_folder import used_folder
from pcka.engine.step_cost import seconds_of, step_cost, tensor_bytes
from pcka.losses.numerics import DegenerateLevelWarning
from pcka.modes import evaluation_mode
from pcka.taps import FeatureTap
from pcka.teacher import FrozenTeacher

DECODED = 16  # images of each set that are decoded
TIMED_IMAGES = 4  # images on which an evaluation is timed
LOGGERS = ("detectron2", "fvcore")

logger = logging.getLogger("detectron2.pcka")


class Examination:
    """Checks of a configuration; each one needs the results of those before it.

    Args:
        config_file: as in :func:`detection.config.load_config`.
        overrides: likewise.
        aside: folder for what a run would write; the caller removes it.
    """

    def __init__(self, config_file: str, overrides: Sequence[str], aside: Path) -> None:
        self._given = config_file, list(overrides)
        self._aside = aside
        self._folder = ""
        self._cfg: CfgNode | None = None
        self._train: Entries | None = None
        self._test: Entries = []
        self._batch: list[dict[str, Any]] = []
        self._is_loaded = False  # the teacher, if there is one
        self._teacher: FrozenTeacher | None = None  # set if it detects something
        self._trainer: DetectionTrainer | None = None
        self._has_stepped = False
        for name in LOGGERS:  # the checks report their warnings
            logging.getLogger(name).addHandler(logging.NullHandler())

    def checks(self) -> list[tuple[str, Check]]:
        """The checks with their titles, in the order in which they must run."""
        made = [
            ("configuration", self.check_configuration),
            ("data", self._needing("configuration", self.check_data)),
            ("student's pixels", self._needing("data", self.check_student_pixels)),
            ("teacher", self._needing("data", self.check_teacher)),
            ("teacher's pixels", self._needing("data", self.check_teacher_pixels)),
            ("models and levels", self._needing("teacher", self.check_models)),
            ("a step", self._needing("models", self.check_step)),
            ("cost", self._needing("step", self.check_cost)),
            ("disk", self._needing("step", self.check_room)),
        ]
        return [(what, telling(check, logger, DegenerateLevelWarning)) for what, check in made]

    def _needing(self, what: str, check: Check) -> Check:
        """Return the check, to be skipped unless what it needs was found."""

        def found() -> object:
            there = {
                "configuration": self._cfg,
                "data": self._train,
                "teacher": self._is_loaded or None,
                "models": self._trainer,
                "step": self._has_stepped or None,
            }
            return there[what]

        return needing(what, found, check)

    @property
    def cfg(self) -> CfgNode:
        """The configuration; its output goes to the temporary folder."""
        assert self._cfg is not None
        return self._cfg

    @property
    def train(self) -> Entries:
        """The training entries."""
        assert self._train is not None
        return self._train

    @property
    def trainer(self) -> DetectionTrainer:
        """The trainer that runs the steps."""
        assert self._trainer is not None
        return self._trainer

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return torch.device(self.cfg.MODEL.DEVICE)

    def check_configuration(self) -> Verdict:
        """Check keys, values, device, schedule, and that the output folder holds no run."""
        cfg = read_run(*self._given)
        check_teacher_file(cfg)
        self._folder, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, str(self._aside)
        if not Path(cfg.DATASETS.DIGITS.ROOT).is_dir():  # draw the scenes for these checks only
            cfg.DATASETS.DIGITS.ROOT = str(self._aside / "scenes")
        self._cfg = cfg
        if traces := traces_of_run(Path(self._folder)):
            return Verdict(WARN, str(used_folder(Path(self._folder), traces)))
        methods = ", ".join(cfg.DISTILL.METHODS) if is_taught(cfg) else "without a teacher"
        return Verdict(PASS, f"{student_architecture(cfg)}, {methods}, into {self._folder}")

    def check_data(self) -> Verdict:
        """Check that both sets exist and hold what the student learns, and decode some images."""
        cfg = self.cfg
        register_datasets(cfg)
        cfg.freeze()
        train = training_set(cfg)
        check_test_sets(cfg)
        self._test = [entry for name in cfg.DATASETS.TEST for entry in DatasetCatalog.get(name)]
        for key, entries in (("DATASETS.TRAIN", train), ("DATASETS.TEST", self._test)):
            _check_files(key, entries)
        classes = _check_classes(cfg)
        with lent_random_states():
            _decoded(cfg, self._test, training=False)
            self._batch = _decoded(cfg, train, training=True)
        self._train = train
        learns = "label images" if student_architecture(cfg) == SEGMENTER else _counted(train)
        text = (
            f"{len(train)} images with {learns} to train on, {len(self._test)} to evaluate on, of "
            f"{classes} class{'es' * (classes != 1)}"
        )
        if not self._test:
            return Verdict(WARN, f"{text}; DATASETS.TEST is empty: nothing is evaluated")
        return Verdict(PASS, text)

    def check_student_pixels(self) -> Verdict:
        """Check that the student's statistics normalise pixels to about mean 0 and deviation 1."""
        return check_student(self.cfg, [given["image"] for given in self._batch])

    def check_teacher(self) -> Verdict:
        """Check that the teacher's file fits, its maps vary, and it finds objects."""
        cfg = self.cfg
        if not is_taught(cfg):
            self._is_loaded = True
            return Verdict(PASS, "none: the student learns without one")
        wanted, own = cfg.DISTILL.TEACHER, teacher_config(cfg)
        text = f"{wanted.CONFIG_FILE}, {own.MODEL.WEIGHTS or 'random weights'}"
        teacher, lacking = self._built_teacher()
        self._is_loaded = True
        teacher.to(self.device)
        if wanted.RANDOM_WEIGHTS:
            check_features(teacher, cfg, self.train)
            return Verdict(WARN, f"{text}: may be untrained (DISTILL.TEACHER.RANDOM_WEIGHTS)")
        if lacking:
            check_features(teacher, cfg, self.train)
            return Verdict(PASS, f"{text}: its backbone is complete, but its head is not")
        if (theirs := _classes(own)) != (ours := _classes(cfg)):
            check_features(teacher, cfg, self.train)
            return Verdict(
                PASS, f"{text}: complete; has other classes ({theirs}) than the data ({ours})"
            )
        found = check_teacher(teacher, cfg, self.train)
        if found:
            self._teacher = teacher
        return Verdict(PASS, f"{text}: complete, {found or 'not tried on objects'}")

    def _built_teacher(self) -> tuple[FrozenTeacher, bool]:
        """Return the teacher, with its head if the file holds it, and whether it lacks one."""
        try:
            return build_teacher(self.cfg, with_head=True), False
        except ConfigError:
            if has_head(self.cfg):
                raise
        return build_teacher(self.cfg), True

    def check_teacher_pixels(self) -> Verdict:
        """Check that no other channel order or common pixel statistics improve the teacher."""
        if self._teacher is None:
            return Verdict(SKIP, "skipped: there is no teacher that finds anything")
        order = teacher_config(self.cfg).INPUT.FORMAT
        return check_teacher_pixels(self._teacher, self.cfg, order, self.train)

    def check_models(self) -> Verdict:
        """Build everything that a training needs; report the shapes of the compared maps."""
        self._trainer = DetectionTrainer(self.cfg, resume=False, teacher_is_tried=True)
        model = self._trainer.model
        parameters = sum(p.numel() for p in student_of(model).parameters())
        text = f"{student_architecture(self.cfg)} of {parameters / 1e6:.1f} M parameters"
        if not isinstance(model, DistilledDetector) or model.teacher is None:
            return Verdict(PASS, text)
        batch = self._batch[: self.cfg.SOLVER.IMS_PER_BATCH]
        pairs = [
            f"{level} {'x'.join(map(str, ours))} from {'x'.join(map(str, theirs))}"
            for level, (ours, theirs) in _level_shapes(model, batch).items()
        ]
        return Verdict(PASS, f"{text}; {', '.join(pairs) or 'only heads are compared'}")

    def check_step(self) -> Verdict:
        """Run one step; its loss terms and gradients must be finite."""
        trainer, batch = self.trainer, self.cfg.SOLVER.IMS_PER_BATCH
        open_loader(trainer)
        with EventStorage(trainer.start) as storage:
            trainer.iter = trainer.start
            try:
                trainer.run_step()
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"SOLVER.IMS_PER_BATCH: {batch} images do not fit the GPU; use fewer or "
                    "smaller ones (INPUT.MIN_SIZE_TRAIN), or SOLVER.AMP.ENABLED True; several "
                    "processes share the batch"
                ) from error
            except FloatingPointError as error:
                raise ConfigError(f"{error}; lower the loss weights") from error
            values = {name: value for name, (value, _) in storage.latest().items()}
        named = trainer.model.named_parameters()
        wrong = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        if wrong:
            return Verdict(
                FAIL, f"the gradient of {wrong[0]} is not finite; lower the loss weights"
            )
        self._has_stepped = True
        terms = {n.removeprefix("loss_"): v for n, v in values.items() if n.startswith("loss_")}
        told = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        return Verdict(PASS, f"{told}; gradients finite")

    def check_cost(self) -> Verdict:
        """Measure the time and memory of a step, and estimate the time of the whole run."""
        cfg, trainer = self.cfg, self.trainer
        with EventStorage(trainer.start):
            cost = step_cost(trainer.run_step, self.device)
        evaluating = self._evaluation_seconds()
        period, steps = cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER
        evaluations = 1 + ((steps - 1) // period if period > 0 else 0)
        run = cost.seconds * steps + evaluating * evaluations
        spans = {"an evaluation": evaluating, "the run": run}
        return cost.verdict(spans, self.device, "SOLVER.IMS_PER_BATCH")

    def _evaluation_seconds(self) -> float:
        student, read = student_of(self.trainer.model), make_mapper(self.cfg, training=False)
        entries = _spaced(self._test, TIMED_IMAGES)
        if not entries:
            return 0.0

        def evaluate() -> None:
            for entry in entries:
                student([read(entry)])

        with evaluation_mode(student), torch.no_grad(), lent_random_states():
            student([read(entries[0])])  # warms up
            return seconds_of(evaluate) * len(self._test) / len(entries)

    def check_room(self) -> Verdict:
        """Check the free disk space for the run's checkpoints, plus one that is being written."""
        solver, keeper = self.cfg.SOLVER, self.trainer.checkpointer
        parts = [part.state_dict() for part in keeper.checkpointables.values()]
        each = tensor_bytes([keeper.model.state_dict(), *parts])
        checkpoints = solver.MAX_ITER // solver.CHECKPOINT_PERIOD + 1
        status, text = check_disk(
            self._folder,
            each * (checkpoints + 1),
            "make room, set a larger SOLVER.CHECKPOINT_PERIOD, or choose another OUTPUT_DIR",
        )
        return Verdict(status, f"{text} ({checkpoints} checkpoints)")


@torch.no_grad()
def _level_shapes(
    model: DistilledDetector, batch: list[dict[str, Any]]
) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    """Level -> (channels, height, width) of the student's map and of the teacher's."""
    images = [given["image"] for given in batch]
    student, canvas_of = model.student, {"canvas": "backbone:input"}
    with evaluation_mode(student), FeatureTap(student, canvas_of) as tap:
        ours = model.distiller.observe_student(batch).features
        canvas = tuple(tap.pop()["canvas"].shape[-2:])
    theirs = model.distiller.observe_teacher(images, canvas)
    assert theirs is not None
    return {level: (ours[level].shape[1:], theirs.feature(level).shape[1:]) for level in ours}


def _decoded(cfg: CfgNode, entries: Entries, *, training: bool) -> list[dict[str, Any]]:
    """Load some entries as model inputs."""
    read = make_mapper(cfg, training=training)
    return [read(entry) for entry in _spaced(entries, DECODED)]


def _check_files(key: str, entries: Entries) -> None:
    """Refuse missing files; the message names the first few."""
    paths = [Path(path) for entry in entries for path in _files_of(entry)]
    there = {folder: _names_in(folder) for folder in {path.parent for path in paths}}
    if missing := [str(path) for path in paths if path.name not in there[path.parent]]:
        raise ConfigError(
            f"{key}: {len(missing)} of {len(paths)} files are missing: {first_names(missing)}"
        )


def _files_of(entry: Mapping[str, Any]) -> Iterator[str]:
    for key in ("file_name", "sem_seg_file_name"):
        if key in entry:
            yield entry[key]


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _check_classes(cfg: CfgNode) -> int:
    """Return the number of classes; the data and the model must agree."""
    ours = _classes(cfg)
    kind = "stuff_classes" if student_architecture(cfg) == SEGMENTER else "thing_classes"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        known = MetadataCatalog.get(name).get(kind)
        if known is not None and len(known) != ours:
            raise ConfigError(
                f"DATASETS: {name!r} has {len(known)} classes, the model {ours}; give the model as "
                "many (NUM_CLASSES of its head)"
            )
    return ours


def _classes(cfg: CfgNode) -> int:
    if student_architecture(cfg) == SEGMENTER:
        return cast(int, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return class_count(cfg)


def _counted(entries: Entries) -> str:
    objects = [one for entry in entries for one in objects_of(entry)]
    masks = sum("segmentation" in one for one in objects)
    return f"{len(objects)} boxes" + (f" ({masks} with masks)" if masks else "")


def _spaced(entries: Entries, count: int) -> Entries:
    """Return up to ``count`` entries, evenly spaced over the set."""
    chosen = torch.linspace(0, len(entries) - 1, min(count, len(entries))).long().tolist()
    return [entries[position] for position in chosen]
