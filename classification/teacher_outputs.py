"""A teacher's outputs on training images, kept on disk for later runs on the same images.

An augmented image depends on (SEED, epoch, image) and the keys of DATA. So do the teacher's outputs
on it, regardless of student, losses, batch and number of processes::

    FOLDER/manifest.json                   what else they depend on: teacher, images, keys
    FOLDER/seed0/epoch0001/<digest>.pth    indices (M,), and the outputs on these images

Files are written atomically. Missing outputs are computed by the teacher and added.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from classification.config import default_config
from classification.data import Batch, ImageSet
from classification.data.batches import mixes
from pcka.distiller import Distiller
from pcka.distributed import from_first_process, rank
from pcka.engine.config import ConfigError, flatten
from pcka.engine.cuda_graph import map_tensors
from pcka.files import CheckpointError, atomic_save, atomic_write, load_file
from pcka.losses import Loss, Outputs

logger = logging.getLogger("pcka")

MANIFEST = "manifest.json"
PART_BYTES = 2**28  # outputs held in memory before they are written

# Keys of the teacher and its arithmetic, besides its weights.
TEACHER_KEYS = (
    *("AUTOCAST", "CHANNELS_LAST", "COMPILE", "TEACHER.NAME", "TEACHER.KWARGS", "TEACHER.LOGITS"),
    *("TEACHER.PIXEL_MEAN", "TEACHER.PIXEL_STD", "TEACHER.SHARES"),
)
# Keys of DATA that do not affect training images. Keys added later are taken to affect them.
UNSEEN = tuple(
    f"DATA.{key}"
    for key in (
        *("NAME", "ROOT", "TRAIN_PART", "TEST_PART", "IMAGE_COLUMN", "LABEL_COLUMN", "RESIZE"),
        *("NUM_CLASSES", "DOWNLOAD", "MEMORY_GB", "WORKERS"),
    )
)


@dataclass(frozen=True)
class KeptOutputs:
    """The outputs on the training images, for several ``SEED``s.

    Attributes:
        folder: ``TEACHER.OUTPUTS``.
        images: number of training images.
    """

    folder: Path
    images: int

    def epoch(self, seed: int, epoch: int, taps: Mapping[str, str]) -> EpochOutputs:
        """Return the kept outputs of an epoch.

        Args:
            seed: of the training.
            epoch: 0 for the first.
            taps: tap name -> path in the teacher, read besides the logits.
        """
        folder = self.folder / f"seed{seed}" / f"epoch{epoch + 1:04d}"
        return EpochOutputs(folder, self.images, taps)


class EpochOutputs:
    """The teacher's outputs on the images of one epoch, by their positions in the training set.

    Outputs are read bit for bit as they were kept, including dtype and memory layout.

    Args:
        folder: of the files.
        images: number of training images.
        taps: tap name -> path in the teacher. Files that lack one of the paths are ignored.

    Raises:
        ConfigError: a damaged file.
    """

    def __init__(self, folder: Path, images: int, taps: Mapping[str, str]) -> None:
        self._folder, self._taps = folder, dict(taps)
        self._part = torch.full((images,), -1)  # of each image; -1: nothing is kept
        self._row = torch.zeros(images, dtype=torch.int64)  # of each image in its part
        self._parts: dict[int, Outputs] = {}  # features by path
        self._fresh: dict[int, Tensor] = {}  # positions of the parts that are only in memory
        self._fresh_bytes = 0
        for file in sorted(folder.glob("*.pth")):
            self._open(file)

    def knows(self, positions: Tensor) -> bool:
        """Whether the outputs on all images at ``positions``, (B,) int64, are available."""
        return bool((self._part[positions] >= 0).all())

    def read(self, positions: Tensor) -> Outputs:
        """Return the outputs on the images at ``positions``, (B,) int64, all of which are known."""
        parts, rows = self._part[positions], self._row[positions]
        numbers = parts.unique().tolist()
        if len(numbers) == 1:
            outputs = _rows(self._parts[numbers[0]], rows)
        else:
            places = [(parts == number).nonzero().flatten() for number in numbers]
            pairs = zip(numbers, places, strict=True)
            pieces = [_rows(self._parts[number], rows[place]) for number, place in pairs]
            outputs = _rows(_joined(pieces), torch.cat(places).argsort())
        by_tap = {tap: outputs.features[path] for tap, path in self._taps.items()}
        return Outputs(outputs.logits, by_tap)

    def keep(self, positions: Tensor, outputs: Outputs) -> None:
        """Keep the outputs on the images at ``positions``, (B,) int64, except known ones.

        They are written once there are many, or by :meth:`write`.
        """
        new = (self._part[positions] < 0).nonzero().flatten()
        if not len(new):
            return
        by_path = {path: outputs.features[tap] for tap, path in self._taps.items()}
        cpu = map_tensors(Tensor.cpu, Outputs(outputs.logits, by_path))
        rows = _rows(cpu, new)
        self._fresh[self._add(positions[new], rows)] = positions[new]
        self._fresh_bytes += _bytes(rows)
        if self._fresh_bytes >= PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write what is only in memory."""
        if not self._fresh:
            return
        indices = torch.cat(list(self._fresh.values()))
        outputs = _joined([self._parts.pop(number) for number in self._fresh])
        self._fresh, self._fresh_bytes = {}, 0
        self._part[indices] = -1
        about = hashlib.sha256(indices.numpy().tobytes())
        about.update(repr(sorted(outputs.features)).encode())
        file = self._folder / f"{about.hexdigest()[:12]}.pth"
        content = {"indices": indices, "logits": outputs.logits, "features": dict(outputs.features)}
        atomic_save(content, file)
        self._open(file)

    def _open(self, file: Path) -> None:
        """Memory-map a file, if it has everything that is read."""
        try:
            content: Any = load_file(file, mmap=True)
            indices, outputs = content["indices"], Outputs(content["logits"], content["features"])
        except (CheckpointError, KeyError, TypeError) as error:
            raise ConfigError(
                f"TEACHER.OUTPUTS: {str(file)!r} is damaged ({error}); remove it to compute it "
                "again"
            ) from error
        if outputs.features.keys() >= set(self._taps.values()):
            by_path = {path: outputs.features[path] for path in self._taps.values()}
            self._add(indices, Outputs(outputs.logits, by_path))

    def _add(self, positions: Tensor, outputs: Outputs) -> int:
        number = max(self._parts, default=-1) + 1
        self._parts[number] = outputs
        self._part[positions] = number
        self._row[positions] = torch.arange(len(positions))
        return number


class StepOutputs:
    """The outputs on all batches of a step: of one epoch, each batch with a different ``SEED``.

    Args:
        kept: for each batch; None where the teacher is not needed.
    """

    def __init__(self, kept: Sequence[EpochOutputs | None]) -> None:
        self._kept = kept

    def knows(self, positions: Sequence[Tensor]) -> bool:
        """Whether all outputs that are needed are available.

        Args:
            positions: for each batch, those of its images in the training set, (B,) int64.
        """
        pairs = zip(self._kept, positions, strict=True)
        return all(kept is None or kept.knows(where) for kept, where in pairs)

    def keep(self, positions: Sequence[Tensor], outputs: Sequence[Outputs | None]) -> None:
        """Keep the teacher's outputs on each batch."""
        for kept, where, of_teacher in zip(self._kept, positions, outputs, strict=True):
            if kept is not None and of_teacher is not None:
                kept.keep(where, of_teacher)

    def read(self, positions: Sequence[Tensor], device: torch.device) -> list[Outputs | None]:
        """Return the outputs on each batch, on the training device."""
        return [
            None if kept is None else _on_device(kept.read(where), device)
            for kept, where in zip(self._kept, positions, strict=True)
        ]

    def write(self) -> None:
        """Write what is only in memory."""
        for kept in self._kept:
            if kept is not None:
                kept.write()


def check_size(cfg: CfgNode, distiller: Distiller, outputs: Outputs, images: int) -> None:
    """Log how much space the outputs of a training will take; refuse more than is allowed.

    Args:
        cfg: SOLVER.EPOCHS, TEACHER.OUTPUTS and TEACHER.OUTPUTS_GB are read.
        distiller: of the training.
        outputs: of its teacher on some images.
        images: number of training images.

    Raises:
        ConfigError: too much; the largest output and the losses that read it are named.
    """
    epochs, allowed = cfg.SOLVER.EPOCHS, cfg.TEACHER.OUTPUTS_GB
    tensors = {path: outputs.features[tap] for tap, path in distiller.teacher_paths.items()}
    if outputs.logits is not None:
        tensors["logits"] = outputs.logits
    samples = images * epochs / 1e9
    gigabytes = {path: samples * x[0].numel() * x.element_size() for path, x in tensors.items()}
    total, folder = sum(gigabytes.values()), cfg.TEACHER.OUTPUTS
    if total <= allowed:
        logger.info("teacher's outputs: %.3g GB in %d epochs, in %s", total, epochs, folder)
        return
    largest = max(gigabytes, key=gigabytes.__getitem__)
    about = " x ".join(map(str, tensors[largest].shape[1:])) + _users(distiller, largest)
    raise ConfigError(
        f"TEACHER.OUTPUTS_GB: the teacher's outputs take {total:.3g} GB in {epochs} epochs, "
        f"{gigabytes[largest]:.3g} of them at {largest} ({about}), the limit is {allowed:.3g}; "
        "raise it, choose losses that read less, or set TEACHER.OUTPUTS to ''"
    )


def open_outputs(cfg: CfgNode, weights: Mapping[str, Tensor], train_set: ImageSet) -> KeptOutputs:
    """Return the outputs in ``TEACHER.OUTPUTS``, after checking that they fit this training.

    Args:
        cfg: of the students.
        weights: of the teacher as it is loaded, by name.
        train_set: the training images.

    Raises:
        ConfigError: as :func:`check_outputs`, or the folder cannot be written.
    """
    folder = Path(cfg.TEACHER.OUTPUTS).expanduser()
    manifest = _manifest(cfg, weights, train_set)
    if rank() == 0:
        _write_manifest(folder, manifest)
    from_first_process(None)  # wait for it
    _check_manifest(folder, manifest)
    return KeptOutputs(folder, len(train_set))


def check_outputs(cfg: CfgNode, weights: Mapping[str, Tensor], train_set: ImageSet) -> None:
    """Refuse outputs in ``TEACHER.OUTPUTS`` that do not fit this training; nothing is written.

    Args:
        cfg, weights, train_set: as for :func:`open_outputs`.

    Raises:
        ConfigError: the folder holds outputs of another teacher or on other images (the key that
            differs is named), or something else.
    """
    folder = Path(cfg.TEACHER.OUTPUTS).expanduser()
    if not _is_empty(folder):
        _check_manifest(folder, _manifest(cfg, weights, train_set))


def _check_manifest(folder: Path, manifest: dict[str, object]) -> None:
    ours = json.loads(json.dumps(manifest))
    try:
        read = json.loads((folder / MANIFEST).read_text())
        # A key that is newer than the folder had its default.
        theirs = {key: v for key, v in flatten(default_config()).items() if key in ours} | read
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"TEACHER.OUTPUTS: {str(folder)!r} is not a folder of teacher outputs: its {MANIFEST} "
            f"cannot be read ({error}); name another folder, or remove this one"
        ) from error
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        raise ConfigError(
            f"TEACHER.OUTPUTS: {str(folder)!r} was made with {key} {theirs.get(key)!r}, this "
            f"training has {ours.get(key)!r}; name another folder"
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder is missing or holds nothing but hidden files."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name.startswith(".") for path in folder.iterdir())


def _write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write the manifest of an empty folder; leave any other folder as it is."""
    try:
        if not _is_empty(folder):
            return
        text = json.dumps(manifest, indent=2)
        atomic_write(lambda file: file.write(text.encode()), folder / MANIFEST)
    except OSError as error:
        raise ConfigError(f"TEACHER.OUTPUTS: cannot write there: {error}") from error


def _manifest(
    cfg: CfgNode, weights: Mapping[str, Tensor], train_set: ImageSet
) -> dict[str, object]:
    """Return what the outputs depend on besides SEED and epoch, by configuration key."""
    values = flatten(cfg)
    seen = [key for key in values if key.startswith("DATA.") and key not in UNSEEN]
    # A mixed image depends on the others of its batch.
    mixed = ["SOLVER.BATCH_SIZE"] if mixes(cfg.DATA) else []
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    # The digest covers the others' weights, wherever their files are.
    others = [{**other, "WEIGHTS": ""} for other in cfg.TEACHER.OTHERS]
    return {
        "TEACHER.OTHERS": others,
        **{key: values[key] for key in (*TEACHER_KEYS, *seen, *mixed)},
        "TEACHER.WEIGHTS": digest.hexdigest(),
        "DATA.ROOT": train_set.fingerprint,
    }


def _users(distiller: Distiller, path: str) -> str:
    """Which losses read a feature of the teacher, for the message."""
    taps = {tap for tap, other in distiller.teacher_paths.items() if other == path}
    losses = cast(Iterable[Loss], distiller.losses)
    names = [type(loss).__name__ for loss in losses if taps & set(loss.taps)]
    return f", read by {', '.join(names)}" if names else ""


def with_positions(
    steps: Iterable[Sequence[Batch]],
) -> Iterator[tuple[Sequence[Batch], list[Tensor]]]:
    """Yield each step with its batches' positions in host memory.

    From a CUDA device they are copied one step ahead, so that nothing waits for the work between.
    """
    before: tuple[Sequence[Batch], Callable[[], list[Tensor]]] | None = None
    for step in steps:
        begun = step, _copied([batch.indices for batch in step])
        if before is not None:
            yield before[0], before[1]()
        before = begun
    if before is not None:
        yield before[0], before[1]()


def _copied(positions: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start copying; return a function that waits for the copies and returns them."""
    copies = [indices.to("cpu", non_blocking=True) for indices in positions]
    if not any(indices.is_cuda for indices in positions):
        return lambda: copies
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[Tensor]:
        arrived.synchronize()
        return copies

    return wait


def _on_device(outputs: Outputs, device: torch.device) -> Outputs:
    if device.type != "cuda":
        return outputs
    # From pinned memory, so that nothing waits for the copy.
    moved: Outputs = map_tensors(lambda x: x.pin_memory().to(device, non_blocking=True), outputs)
    return moved


def _rows(outputs: Outputs, rows: Tensor) -> Outputs:
    """Return the outputs on the samples at ``rows``, (M,) int64."""
    taken: Outputs = map_tensors(
        lambda x: _in_order(lambda dim, dense: dense.index_select(dim, rows), x), outputs
    )
    return taken


def _joined(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs on the samples of all parts, in order."""

    def join(tensors: Collection[Tensor]) -> Tensor:
        return _in_order(lambda dim, *dense: torch.cat(dense, dim), *tensors)

    logits = [part.logits for part in parts if part.logits is not None]
    names = parts[0].features
    features = {name: join([part.features[name] for part in parts]) for name in names}
    return Outputs(join(logits) if logits else None, features)


def _in_order(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return ``function(dim, *tensors)``, samples along ``dim``, in the tensors' memory layout.

    Sums over a map may differ in the last bit if its layout differs (channels last).
    """
    strides = tensors[0].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    result = function(order.index(0), *(x.permute(order) for x in tensors))
    return result.permute([order.index(dim) for dim in range(len(strides))])


def _bytes(outputs: Outputs) -> int:
    tensors = [*outputs.features.values(), *([] if outputs.logits is None else [outputs.logits])]
    return sum(x.numel() * x.element_size() for x in tensors)
