"""An image set that is read from its files batch by batch, for data too large for memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from classification.data.batches import (
    IMAGE_STREAM,
    Batch,
    epoch_order,
    evaluation_share,
    steps_per_epoch,
    stream_seed,
    to_unit_range,
    training_share,
)
from classification.data.image_files import ImageFiles, cut_centre
from classification.data.image_set import EVALUATION_BATCH_SIZE, ImageSet
from pcka.engine.config import ConfigError


@dataclass(frozen=True)
class StreamingSet(ImageSet):
    """Image files that worker processes decode and augment ahead of training.

    Training takes a random crop of an image, of 8 to 100 % of its area and an aspect ratio of 3:4
    to 4:3, resizes it to a square (Szegedy et al. 2015, section 6), and mirrors half of the images.
    Evaluation resizes the shorter side and crops the centre.

    Attributes:
        files: files of the images.
        image_size: side of the batches' images, pixels.
        resize: size of the shorter side before the centre crop, pixels.
        workers: number of decoding processes; 0: this process decodes.
    """

    files: ImageFiles
    labels: Tensor
    classes: tuple[str, ...]
    image_size: int
    resize: int
    workers: int

    @cached_property
    def fingerprint(self) -> str:
        """A digest (hex) of file names, sizes and labels, class names and the images' side.

        It queries the size of every file, but reads none.
        """
        about = ("streaming", self.image_size, self.classes, self.files.digest)
        digest = hashlib.sha256(repr(about).encode())
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> StreamingSet:
        return replace(self, labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> StreamingSet:
        labels = self.labels[indices.to(self.device)]
        return replace(self, files=self.files.take(indices.cpu().numpy()), labels=labels)

    def training_batches(
        self, cfg: CfgNode, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield :meth:`ImageSet.training_batches`, as DATA.FLIP specifies."""
        steps = steps_per_epoch(self, cfg, world_size)
        order = epoch_order(self, cfg, epoch)
        share = training_share(order, steps, cfg.SOLVER.BATCH_SIZE, rank, world_size)
        crop = v2.RandomResizedCrop(self.image_size, antialias=True)
        mirror = [v2.RandomHorizontalFlip()] if cfg.DATA.FLIP else []
        transform = v2.Compose([crop, *mirror, v2.PILToTensor()])
        pictures = _Pictures(self.files, transform, (cfg.SEED, epoch, IMAGE_STREAM))
        yield from self._stream(pictures, list(share))

    def evaluation_batches(
        self, batch_size: int = EVALUATION_BATCH_SIZE, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        centre = partial(cut_centre, resize=self.resize, image_size=self.image_size)
        pictures = _Pictures(self.files, centre)
        yield from self._stream(pictures, evaluation_share(self, batch_size, rank, world_size))

    def _stream(self, pictures: Dataset[Tensor], batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield batches of images, (B,) positions each, while workers prepare the next ones."""
        loader = DataLoader(
            pictures,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the default would draw from the global one
        )
        for batch, images in zip(batches, _with_short_errors(loader)):
            # From pinned memory: the copy waits in the device's queue, but the host does not wait.
            chosen = batch.to(self.device, non_blocking=True)
            images = to_unit_range(images.to(self.device, non_blocking=True))
            yield Batch(images, self.labels[chosen], chosen)


def _with_short_errors(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the batches; shorten a worker's ``ConfigError`` to its reason, without traceback."""
    try:
        yield from loader
    except ConfigError as error:
        raise ConfigError(str(error).rpartition("ConfigError: ")[2].rstrip()) from error


@dataclass(frozen=True)
class _Pictures(Dataset[Tensor]):
    """Decoded and transformed images, (3, S, S) uint8, by position.

    Random numbers depend only on the stream and the position: torchvision draws from torch's global
    generator, which is seeded for each image and restored afterwards, so that neither the number of
    workers nor their earlier work affects the result.
    """

    files: ImageFiles
    transform: Callable[[Image.Image], Tensor]
    stream: tuple[int, ...] = ()

    def __getitem__(self, position: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also seed the CUDA devices of this process.
            torch.default_generator.manual_seed(stream_seed(*self.stream, position))
            return self.transform(self.files.open(position))
