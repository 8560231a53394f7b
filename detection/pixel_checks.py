"""Checks that both models get images as they expect them: channel order and pixel statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from torch import Tensor

from detection.data.mapper import make_mapper
from detection.data.pixels import Labels
from detection.data.targets import Entries
from detection.run_state import lent_random_states
from detection.teacher import TeacherDetector
from detection.teacher_checks import (
    class_ious,
    found_objects,
    gives_pixels,
    objects_of,
    pixel_counts,
    read_truth,
    some,
)
from pcka.engine.doctor import FAIL, PASS, SKIP, WARN, Verdict
from pcka.engine.pixel_trials import PixelInput, better_input, is_normal, numbers
from pcka.engine.step_cost import seconds_of
from pcka.teacher import FrozenTeacher

LEAST_IMAGES = 4
LONG_ENOUGH = 60.0  # time budget of all trials with more than LEAST_IMAGES, in seconds
TRIALS = 9
NEARER = 0.5  # ratio of distances below which the reversed means are taken as the intended ones
FAR = 0.5  # distance in standard deviations, summed over the channels

# Statistics that models are usually trained with, in RGB order, for pixels from 0 to 255.
IMAGENET = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
USUAL = {
    "ImageNet's": IMAGENET,
    "those of Caffe's weights": (IMAGENET[0], [1.0] * 3),
    "those for [-1, 1]": ([127.5] * 3, [127.5] * 3),
    "those for [0, 1]": ([0.0] * 3, [255.0] * 3),
    "those for [0, 255]": ([0.0] * 3, [1.0] * 3),
}
OTHER_ORDER = {"RGB": "BGR", "BGR": "RGB"}


def image_statistics(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, ``(3,)``, of images ``(3, H_i, W_i)``, 0 to 255."""
    pixels = torch.cat([image.flatten(1) for image in images], dim=1).float()
    std, mean = torch.std_mean(pixels, dim=1)
    return mean, std


def check_student(cfg: CfgNode, images: Sequence[Tensor]) -> Verdict:
    """Check that the student's statistics bring the images near mean 0 and deviation 1.

    Weights trained with Caffe use only means; their deviations are not judged.

    Args:
        cfg: the run's configuration.
        images: ``(3, H_i, W_i)`` from 0 to 255, as the data loader returns them.
    """
    means, stds = image_statistics(images)
    own, divided = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    pixels = torch.cat([image.flatten(1) for image in images], dim=1).float()
    std, mean = torch.std_mean((pixels - own[:, None]) / divided[:, None])
    text = f"normalised, they have mean {mean:.2f} and deviation {std:.2f}"
    measured = f"these images have {numbers(means.tolist())} and {numbers(stds.tolist())}"
    order = cfg.INPUT.FORMAT
    here, reversed_ = (((means - given) / stds).abs().sum() for given in (own, own.flip(0)))
    if here > FAR and reversed_ < NEARER * here:
        return Verdict(
            WARN,
            f"{text}; MODEL.PIXEL_MEAN fits the images better in reverse "
            f"({measured}, in INPUT.FORMAT's order {order}): reverse PIXEL_MEAN and PIXEL_STD, or "
            f"set INPUT.FORMAT {OTHER_ORDER.get(order, '')}",
        )
    as_caffe = cfg.MODEL.WEIGHTS and bool((divided == 1).all())
    if as_caffe and abs(mean) < 1.5 * stds.max():
        return Verdict(PASS, f"{text}, with PIXEL_STD 1 as for Caffe's weights")
    if is_normal(mean.item(), std.item()):
        return Verdict(PASS, text)
    return Verdict(
        WARN,
        f"{text}, far from 0 and 1; check MODEL.PIXEL_MEAN and PIXEL_STD ({measured}, in the order "
        f"{order})",
    )


@torch.no_grad()
def check_teacher_pixels(
    teacher: FrozenTeacher, cfg: CfgNode, order: str, dataset: Entries
) -> Verdict:
    """Check whether a teacher is better with swapped channels, or with other common statistics.

    A detector is judged by the objects that it finds with its top ``M`` detections in an image of
    ``M`` objects, a segmenter by the intersection over union of each class in each image.

    Args:
        teacher: wraps a :class:`detection.teacher.TeacherDetector`, on its device.
        cfg: the run's configuration; images are read as for an evaluation.
        order: the teacher's channel order, ``"RGB"`` or ``"BGR"``.
        dataset: training entries of the run.
    """
    whole = cast(TeacherDetector, teacher.model)
    detector: Any = whole.detector
    if not all(
        isinstance(getattr(detector, f"pixel_{of}", None), Tensor) for of in ("mean", "std")
    ):
        return Verdict(SKIP, f"skipped: {type(detector).__name__} has no pixel statistics")
    own = PixelInput(
        *(getattr(detector, f"pixel_{of}").flatten().tolist() for of in ("mean", "std"))
    )
    tried = _Tried(whole, cfg, dataset)
    step = 1 if order == "RGB" else -1
    usual = {name: (mean[::step], std[::step]) for name, (mean, std) in USUAL.items()}
    usual["these images' own"] = tried.statistics()
    better = better_input(own, usual, OTHER_ORDER.get(order, "other order"), tried.score)
    what = "of classes in pixels (mIoU)" if tried.labels else "of the objects"
    ours = f"{better.ours:.2f} % {what} in {len(tried.images)} images"
    if better.given is None:
        return Verdict(
            PASS, f"{ours}; no other channel order or usual statistics are clearly better"
        )
    kind, _, name = better.name.partition(": ")
    text = f"{kind}: {better.reached:.2f} % with {name}, as configured {ours}; "
    given = better.given
    keys = [f"INPUT.FORMAT {OTHER_ORDER.get(order)}"] * given.swapped
    if (given.mean, given.std) != (own.mean, own.std):
        keys += [
            f"MODEL.PIXEL_MEAN {numbers(given.mean)}",
            f"MODEL.PIXEL_STD {numbers(given.std)}",
        ]
    return Verdict(
        FAIL,
        f"{text}set {' and '.join(keys)} in {cfg.DISTILL.TEACHER.CONFIG_FILE}, or with "
        "DISTILL.TEACHER.OPTS",
    )


class _Tried:
    """The images that a teacher is tried on, and its scores on them.

    Args:
        teacher: a whole detector or segmenter.
        cfg: the run's configuration.
        dataset: training entries of the run.
    """

    def __init__(self, teacher: TeacherDetector, cfg: CfgNode, dataset: Entries) -> None:
        self.teacher = teacher
        of_pixels = gives_pixels(teacher.detector, dataset)
        self.labels = Labels.of(cfg) if of_pixels else None
        entries = dataset if of_pixels else [entry for entry in dataset if objects_of(entry)]
        with lent_random_states():
            read = make_mapper(cfg, training=False)
            self.images = [(entry, read(entry)) for entry in some(entries)]
        self._right(*self.images[0])  # warms up
        seconds = max(seconds_of(lambda: self._right(*self.images[0])), 1e-3)
        affordable = int(LONG_ENOUGH / (TRIALS * seconds))
        self.images = self.images[: max(LEAST_IMAGES, affordable)]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Statistics of the images, in the teacher's channel order."""
        images = [given["image"] for _, given in self.images]
        mean, std = image_statistics(images)
        step = -1 if self.teacher.swap_channels else 1
        return mean.tolist()[::step], std.tolist()[::step]

    def score(self, given: PixelInput) -> Tensor:
        """Score of the teacher on each object, or each class in an image: ``(N,)`` from 0 to 1."""
        with _taking(self.teacher, given):
            return torch.cat([self._right(*one) for one in self.images])

    def _right(self, entry: dict[str, Any], given: dict[str, Any]) -> Tensor:
        if self.labels is not None:
            truth = read_truth(self.labels, entry)
            classes = self.teacher.classify(given["image"], *truth.shape)
            return class_ious(pixel_counts(classes, truth, self.labels))
        objects = objects_of(entry)
        seen: Any = self.teacher.detect(given["image"], given["height"], given["width"]).to("cpu")
        surest = seen.scores.argsort(descending=True)[: len(objects)]
        return found_objects(seen[surest], objects)


@contextmanager
def _taking(teacher: TeacherDetector, given: PixelInput) -> Iterator[None]:
    """Let a teacher use another input normalisation and channel order within a block."""
    detector: Any = teacher.detector
    before = detector.pixel_mean, detector.pixel_std, teacher.swap_channels
    detector.pixel_mean, detector.pixel_std = (
        torch.tensor(values).to(tensor).view_as(tensor)
        for values, tensor in zip((given.mean, given.std), before)
    )
    teacher.swap_channels = before[2] != given.swapped
    try:
        yield
    finally:
        detector.pixel_mean, detector.pixel_std, teacher.swap_channels = before
