"""CKA of all layers of two classifiers: ``pcka cka --a MODEL --b MODEL --data FOLDER``."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from classification.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    are_statistics,
    default_config,
    load_config,
)
from classification.data import ImageSet, ResidentSet, load_evaluation_set, pixel_statistics
from classification.data.image_files import FilesOnDisk, read_files
from classification.evaluation import mixed_batches
from classification.models import (
    classes_in,
    has_own_weights,
    load_classifier,
    named_model,
    settings_of,
)
from pcka.analysis import CKATable, cka_matrix
from pcka.analysis.grams import MIN_SAMPLES
from pcka.engine.arguments import command_parser, positive
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.environment import choose_device
from pcka.engine.progress import console_log

logger = logging.getLogger("pcka")

IMAGENET_CLASSES = 1000
RUN_CONFIG, RUN_WEIGHTS = "config.yaml", "model_last.pth"


def main(arguments: Sequence[str] | None = None) -> CKATable:
    """Compare as the arguments say; write the heatmap and the values, and return the table."""
    given = _parser().parse_args(arguments)
    _check(given)
    files = _files(given.output)
    with console_log():
        table, count = _measure(given)
    of_a = _title(given.a, given.weights_a)
    of_b = _title(given.b or given.a, given.weights_b) if _has_b(given) else of_a
    table.plot(files[0], of_a, of_b, title=f"{count} images")
    table.write_csv(files[1])
    rows, columns = table.values.shape
    print(f"CKA of {rows} x {columns} layers on {count} images: {files[0]}, {files[1]}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "CKA of all layers of two classifiers on the same images, as a heatmap (PNG) and a table "
        "(CSV).",
        "pcka cka --a output/ce --b output/kd",
        "pcka cka --a resnet8 --weights-a model.pth --data digits --layers 'layer?'",
    )
    parser.prog = "pcka cka"
    model = "built-in, torchvision/N, timm/N, hf/FOLDER, package.module:factory, or a run's folder"
    parser.add_argument("--a", required=True, metavar="MODEL", help=f"rows: {model}")
    parser.add_argument("--b", default="", metavar="MODEL", help="columns; default: that of a")
    for side in "ab":
        parser.add_argument(
            f"--weights-{side}", default="", metavar="W", help=f"checkpoint of {side}"
        )
    parser.add_argument(
        "--data",
        default="",
        metavar="FOLDER",
        help="images at any depth, or digits (built in); default: the evaluation images of the "
        "run of a",
    )
    parser.add_argument("--layers", nargs="+", metavar="L", help="paths or patterns, for both")
    for side in "ab":
        parser.add_argument(f"--layers-{side}", nargs="+", metavar="L", help=f"for {side} only")
    parser.add_argument(
        "--images", type=positive, default=512, help="how many, evenly spaced (512)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=128, help="images per batch (%(default)s)"
    )
    parser.add_argument("--image-size", type=positive, help="pixels; default: the run's, or 32")
    parser.add_argument(
        "--classes", type=positive, help="for models without weights (1000; digits: 10)"
    )
    parser.add_argument("--pretrained", action="store_true", help="the library's own weights")
    for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        about = "for models outside runs; default: ImageNet's"
        parser.add_argument(f"--pixel-{key}", type=float, nargs=3, default=default, help=about)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output",
        default="output/cka",
        metavar="PATH",
        help="path of the files, without suffix (%(default)s)",
    )
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuse values with which nothing could be measured."""
    for option in ("images", "batch_size"):
        if (value := getattr(given, option)) < MIN_SAMPLES:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name}: CKA needs at least {MIN_SAMPLES}, got {value}")
    if not are_statistics(given.pixel_mean, given.pixel_std):
        raise ConfigError(
            "--pixel-mean and --pixel-std: expected finite numbers, deviations above 0, got "
            f"{given.pixel_mean} and {given.pixel_std}"
        )


def _files(output: str) -> list[Path]:
    """Return the picture and the table to write, whose folder is made."""
    stem = output.removesuffix(".png").removesuffix(".csv")
    if not Path(stem).name or stem.endswith(("/", os.sep)):
        raise ConfigError(f"--output: expected the name of a file without suffix, got {output!r}")
    try:
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {error}") from error
    return [Path(f"{stem}{suffix}") for suffix in (".png", ".csv")]


def _has_b(given: argparse.Namespace) -> bool:
    """Whether the columns are of another model than the rows, or of other weights."""
    return bool(given.b or given.weights_b)


def _measure(given: argparse.Namespace) -> tuple[CKATable, int]:
    """Return the table and the number of images used."""
    device = choose_device(given.device)
    data = _images(given).to(device)
    a = _model(given, given.a, given.weights_a, "a").to(device)
    b = a
    if _has_b(given):
        b = _model(given, given.b or given.a, given.weights_b, "b").to(device)
    if len(data) < MIN_SAMPLES:
        raise ConfigError(f"--data: CKA needs at least {MIN_SAMPLES} images, got {len(data)}")
    layers = given.layers_a or given.layers, given.layers_b or given.layers
    batches = mixed_batches(data, given.images, given.batch_size)
    try:
        table = cka_matrix(a, b, batches, *layers)
    except ValueError as error:  # about the layers
        raise ConfigError(str(error)) from error
    return table, min(given.images, len(data))


def _run_of(word: str) -> CfgNode | None:
    """Return the configuration of the run in a folder, or None if ``word`` is not such a folder."""
    file = Path(word, RUN_CONFIG)
    return load_config(file) if file.is_file() else None


def _images(given: argparse.Namespace) -> ImageSet:
    """The images to compare on.

    Raises:
        ConfigError: no images are named, or the folder holds none.
    """
    run, name = _run_of(given.a), given.data
    if name and name != "digits":
        side = given.image_size or (run or default_config()).DATA.IMAGE_SIZE
        return _of_folder(Path(name).expanduser(), given.images, side)
    if not name and run is None:
        raise ConfigError(
            "--data: expected a folder of images, or digits; it may be omitted if --a is the "
            "folder of a run"
        )
    cfg = default_config() if run is None else run.clone()
    cfg.defrost()
    if name:
        cfg.DATA = default_config().DATA
        cfg.DATA.NAME = name
    cfg.DATA.IMAGE_SIZE = given.image_size or cfg.DATA.IMAGE_SIZE
    return load_evaluation_set(cfg)


def _of_folder(folder: Path, images: int, side: int) -> ImageSet:
    """Return images of a folder, evenly spaced in the order of their paths."""
    walked = os.walk(folder, followlinks=True)  # as the trainers do
    paths = (Path(parent, name) for parent, _, names in walked for name in names)
    found = sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise ConfigError(f"--data: no images in {str(folder)!r}; give a folder of image files")
    files = FilesOnDisk(folder, np.array([os.fsencode(path.relative_to(folder)) for path in found]))
    chosen = np.linspace(0, len(found) - 1, min(images, len(found))).astype(np.int64)
    pixels = read_files(files, side, side, chosen)
    return ResidentSet(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("any",))


def _model(given: argparse.Namespace, word: str, weights: str, side: str) -> nn.Module:
    """Return a model that takes pixels in [0, 1], given its name or the folder of its run."""
    run = _run_of(word)
    if run is not None:
        section, weights = run.STUDENT, weights or str(Path(word, RUN_WEIGHTS))
    else:
        section = default_config().STUDENT
        section.NAME = word
        section.PIXEL_MEAN, section.PIXEL_STD = given.pixel_mean, given.pixel_std
        if given.pretrained and not weights:
            section.KWARGS = CfgNode({"pretrained": True})
    settings = {"role": "student", **settings_of(section)}
    with _naming(side):
        if weights:
            classes = classes_in(section, weights, role="student")
            model = load_classifier(section.NAME, weights, classes, **settings)
        else:
            classes = given.classes or (10 if given.data == "digits" else IMAGENET_CLASSES)
            model = named_model(section.NAME, classes, **settings)
            if not has_own_weights(section):
                logger.warning("%s: %s has random weights (--weights-%s)", side, word, side)
    pixels = pixel_statistics(section).to(choose_device(given.device))
    model.register_forward_pre_hook(lambda _, images: (pixels(*images),))
    return model


@contextmanager
def _naming(side: str) -> Iterator[None]:
    """Name this command's options in errors about configuration keys."""
    try:
        yield
    except ConfigError as error:
        reason = str(error).replace("STUDENT.NAME", f"--{side}")
        raise ConfigError(reason.replace("STUDENT.WEIGHTS", f"--weights-{side}")) from error


def _title(word: str, weights: str) -> str:
    return f"{word} ({Path(weights).name})" if weights else word


if __name__ == "__main__":
    run_command(main)
