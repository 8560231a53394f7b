"""A distilled classifier's training step, data included, compared with a plainly written one.

``python -m benchmarks.classification_step [--blocks B] [--steps S]``. The plain step is what a
straightforward script does: float32, NCHW, eager, the teacher's batch norms unfolded, images
through per-image PIL transforms in two worker processes. Images are random, of CIFAR's size and
count; weights are random. Blocks of steps take turns, and a block's first steps are not counted,
because the plain loader's workers prefetch while others are timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks import device as on_device
from benchmarks.harness import Spread, markdown, ratio
from classification.config import CONFIGS, load_config
from classification.data import ResidentSet
from classification.lessons import Lessons
from classification.models import create_model
from classification.run import prepare_trainers
from classification.teacher import ImageSets
from pcka.engine.environment import choose_device, has_bfloat16
from pcka.losses import fcka_loss, kd_loss, lcka_loss
from pcka.taps import FeatureTap

METHODS = ("kd", "rcka")
TEACHER, STUDENT = "resnet56", "resnet20"
SKIPPED = 5  # more batches than two workers prefetch
Step = Callable[[], float]  # trains on one batch; returns the seconds spent waiting for data


def random_images(
    images: int, classes: int, seed: int = 0, *, side: int = 32
) -> tuple[ResidentSet, ResidentSet]:
    """Return random training images, of CIFAR's size by default, and a few for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(map(str, range(classes)))

    def draw(number: int) -> ResidentSet:
        pixels = torch.randint(256, (number, 3, side, side), dtype=torch.uint8, generator=generator)
        return ResidentSet(pixels, torch.arange(number) % classes, names)

    return draw(images), draw(256)


def configure(method: str, folder: Path, *overrides: str, student: str = STUDENT) -> CfgNode:
    """Return CIFAR-100's recipe for a pair, with random weights of the teacher in ``folder``."""
    weights = folder / "teacher.pth"
    if not weights.exists():
        torch.manual_seed(0)
        torch.save(create_model(TEACHER, 100).state_dict(), weights)
    config_file = CONFIGS / "cifar100" / f"{TEACHER}_{student}.yaml"
    words = ["TEACHER.WEIGHTS", str(weights), "TEACHER.ACCURACY", "0", *overrides]
    return load_config(config_file, words, method)


class _PilImages(Dataset):
    """Images as in torchvision's CIFAR sets, one by one through PIL."""

    def __init__(self, images: ResidentSet) -> None:
        self._pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = images.labels
        self._transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self._transform(Image.fromarray(self._pixels[index]))
        return image, int(self._labels[index])


def plain_step(method: str, images: ResidentSet, batch_size: int, device: torch.device) -> Step:
    """Return the step of a straightforward script."""
    torch.manual_seed(0)
    student = create_model(STUDENT, 100).train().to(device)
    teacher = create_model(TEACHER, 100).eval().requires_grad_(False).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        _PilImages(images),
        batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    taps = [FeatureTap(model, {"last": "layer3"}) for model in (student, teacher)]

    def step() -> float:
        asked = time.perf_counter()
        inputs, labels = next(batches)
        waited = time.perf_counter() - asked
        inputs, labels = (t.to(device, non_blocking=True) for t in (inputs, labels))
        with torch.no_grad():
            target = teacher(inputs)
        logits = student(inputs)
        own, other = (tap.pop()["last"] for tap in taps)
        if method == "kd":
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * kd_loss(logits, target)
        else:
            loss = F.cross_entropy(logits, labels) + 10 * fcka_loss(own, other)
            loss = loss + lcka_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        return waited

    return step


def own_step(cfg: CfgNode, sets: ImageSets) -> Step:
    """Return the step of ``classification/train.py``."""
    (trainer,) = prepare_trainers([cfg], choose_device(cfg.DEVICE), sets)

    def forever() -> Iterator:
        while True:
            yield from trainer.batches()

    learners = [[trainer.distiller]]
    lessons = Lessons(cfg, learners, trainer.device, obstacle=trainer.obstacle, ahead=1)
    batches = forever()

    def step() -> float:
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        for (inputs,) in lessons.over([(batch,)]):
            trainer.step(inputs, 0)
        return waited

    return step


def measure(
    steps: dict[str, Step], blocks: int, length: int, device: str = "cpu"
) -> dict[str, list[tuple]]:
    """Return name -> (seconds per step, share of them spent on data), one mean per block."""
    figures: dict[str, list[tuple]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            for _ in range(SKIPPED):
                step()
            on_device.synchronize(device)
            start = time.perf_counter()
            waited = sum(step() for _ in range(length))
            on_device.synchronize(device)
            seconds = time.perf_counter() - start
            figures[name].append((seconds / length, waited / seconds))
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[tuple]]]:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="timed steps per block")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = choose_device("auto")
    sets = random_images(given.images, 100)
    variants = {"float32": [], "float32 compiled": ["COMPILE", "True"]}
    if has_bfloat16(device):
        variants["bfloat16"] = ["AUTOCAST", "bfloat16"]
    rows, figures = [], {}
    for method in METHODS:
        with TemporaryDirectory() as folder:
            cfgs = {
                name: configure(method, Path(folder), "AUTOCAST", "", *words)
                for name, words in variants.items()
            }
            batch_size = cfgs["float32"].SOLVER.BATCH_SIZE
            steps = {"plain": plain_step(method, sets[0], batch_size, device)}
            steps |= {name: own_step(cfg, sets) for name, cfg in cfgs.items()}
            figures[method] = measure(steps, given.blocks, given.steps, device.type)
        plain = [seconds for seconds, _ in figures[method]["plain"]]
        for name, blocks in figures[method].items():
            seconds = [block[0] for block in blocks]
            rows.append(
                [
                    *(method, name, str(Spread.of([1000 * s for s in seconds]))),
                    str(ratio(plain, seconds)),
                    f"{100 * statistics.median(share for _, share in blocks):.2f}",
                ]
            )
    print(f"{TEACHER} -> {STUDENT}, batch 64, {device}, {given.threads} threads")
    print(markdown(["method", "step", "ms", "plain / it", "in data (%)"], rows))
    return figures


if __name__ == "__main__":
    main()
