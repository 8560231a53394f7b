"""Training images per second of the two kinds of image sets.

Streaming: JPEG files, by default generated at ImageNet's average size (500 x 375 pixels, about
110 kB), decoded, cropped and resized to 224 pixels by 0, 1, 2, … worker processes. Resident: a set
of CIFAR's shape, cropped and flipped in memory. The rate is that of a whole epoch, including the
start of the workers; the seconds until the first batch are given, too. A training step that takes
longer than batch size / rate never waits for its images.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import report
from benchmarks.harness import Spread, interleave, markdown
from classification.config import load_config
from classification.data import ImageSet, ResidentSet, load_image_sets

IMAGENET_SIZE = (500, 375)  # width and height, pixels
CIFAR_SIDE = 32
CLASSES = 2  # of the generated images
GRAIN = 12.0  # standard deviation of their noise, which makes the files as large as photographs


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the files; return the records."""
    options = _options(arguments)
    environment = {**report.start(options.device, options), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        if options.root is None:
            make_images(root, options.images, options.seed)
        epochs = {
            **{f"streaming, {n} workers": _streaming(root, n, options) for n in options.workers},
            "resident": _resident(options),
        }
        rounds = dict.fromkeys(epochs, options.rounds)
        calls = {name: epoch.run for name, epoch in epochs.items()}
        seconds = interleave(calls, rounds, sample_seconds=0.0)
    records = [epoch.record(name, seconds[name]) for name, epoch in epochs.items()]
    print(table(records))
    report.write(options.output, "classification_data", environment, records)
    if options.output is not None:
        _plot(options.output / "classification_data.png", records)
    return records


def _options(arguments: Sequence[str] | None) -> Namespace:
    parser = report.parser("Images a second of the streaming and the resident image set.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for the batches")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--images", type=int, default=2048, help="files of a streaming epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224, help="pixels, of the streaming set")
    parser.add_argument("--resident-images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each variant")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="class-per-folder set to read instead"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.resident_images, options.batch_size = 8, 16, 4
        options.image_size, options.rounds = 32, 1
    return options


class Epoch:
    """One epoch over a set, repeatedly.

    Args:
        data: the set to read.
        cfg: configuration of its batches.
    """

    def __init__(self, data: ImageSet, cfg: CfgNode) -> None:
        self.data = data
        self.cfg = cfg
        self.until_first: list[float] = []

    def run(self) -> None:
        """Load every batch of epoch 0 onto the device."""
        start = time.perf_counter()
        for step, batch in enumerate(self.data.training_batches(self.cfg, epoch=0)):
            if step == 0:
                batch.images[0, 0, 0, 0].item()  # waits for the device
                self.until_first.append(time.perf_counter() - start)
        batch.images[0, 0, 0, 0].item()

    def record(self, name: str, seconds: Sequence[float]) -> dict[str, Any]:
        """Return ``seconds`` per epoch; ``images_per_second``, ``until_first_batch`` (spreads)."""
        batch_size = self.cfg.SOLVER.BATCH_SIZE
        images = len(self.data) // batch_size * batch_size
        streams = self.cfg.DATA.STREAM
        case = {
            "name": name,
            "images": images,
            "batch_size": batch_size,
            "image_size": self.cfg.DATA.IMAGE_SIZE,
            "workers": self.cfg.DATA.WORKERS if streams else None,
        }
        return {
            "case": case,
            "seconds": list(seconds),
            "images_per_second": asdict(Spread.of([images / epoch for epoch in seconds])),
            "until_first_batch": asdict(Spread.of(self.until_first)),
        }


def _streaming(root: Path, workers: int, options: Namespace) -> Epoch:
    cfg = _config(
        options,
        **{"DATA.ROOT": root, "DATA.STREAM": True, "DATA.WORKERS": workers},
        **{"DATA.IMAGE_SIZE": options.image_size, "DATA.TRAIN_IMAGES": options.images},
    )
    train, _ = load_image_sets(cfg)
    return Epoch(train.to(torch.device(options.device)), cfg)


def _resident(options: Namespace) -> Epoch:
    shape = (options.resident_images, 3, CIFAR_SIDE, CIFAR_SIDE)
    labels = torch.zeros(options.resident_images, dtype=torch.int64)
    data = ResidentSet(torch.randint(256, shape, dtype=torch.uint8), labels, ("any",))
    cfg = _config(options, **{"DATA.IMAGE_SIZE": CIFAR_SIDE})
    return Epoch(data.to(torch.device(options.device)), cfg)


def _config(options: Namespace, **keys: object) -> CfgNode:
    values = {
        "STUDENT.NAME": "resnet8",
        "DATA.NAME": "folder",
        "SEED": options.seed,
        "SOLVER.BATCH_SIZE": options.batch_size,
        **keys,
    }
    return load_config(None, [str(word) for pair in values.items() for word in pair])


def make_images(root: Path, images: int, seed: int) -> None:
    """Write JPEG files of smooth shapes under fine grain: ``train``, and one per class in ``val``.

    Args:
        root: folder of the class-per-folder set.
        images: number of training images.
        seed: seed of their pixels.
    """
    generator = np.random.RandomState(seed)
    width, height = IMAGENET_SIZE
    for split, number in (("train", images), ("val", CLASSES)):
        for index in range(number):
            coarse = generator.randint(256, size=(6, 8, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize(IMAGENET_SIZE, Image.Resampling.BICUBIC)
            pixels = np.asarray(smooth) + generator.normal(0, GRAIN, (height, width, 3))
            folder = root / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{index:06}.jpg", quality=95)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row per variant: images/s, seconds to the first batch, shortest step it can feed."""
    rows = []
    for record in records:
        rate, case = Spread(**record["images_per_second"]), record["case"]
        rows.append(
            [
                case["name"],
                f"{rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f})",
                f"{record['until_first_batch']['median']:.3f}",
                f"{1e3 * case['batch_size'] / rate.median:.1f}",
            ]
        )
    return markdown(["", "images/s", "first batch (s)", "a batch (ms)"], rows)


def _plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Plot the streaming rate by number of workers."""
    streaming = [record for record in records if record["case"]["workers"] is not None]
    workers = [record["case"]["workers"] for record in streaming]
    rates = [Spread(**record["images_per_second"]) for record in streaming]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    errors = [[r.median - r.low for r in rates], [r.high - r.median for r in rates]]
    axes.errorbar(workers, [rate.median for rate in rates], errors, marker="o", capsize=3)
    axes.set_xlabel("worker processes")
    axes.set_ylabel("images a second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
