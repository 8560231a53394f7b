"""What a run writes to its OUTPUT_DIR, and reads from it when resumed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from pcka.checkpoint import save_student
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import lock_folder
from pcka.files import atomic_save, atomic_write

logger = logging.getLogger("pcka")

CHECKPOINT = "checkpoint.pth"
KEPT = "epochs"  # folder of students saved at single epochs


class RunFolder:
    """The files of one run; a context manager that reserves the folder for this process.

    A run's folder holds ``config.yaml``, ``classes.txt`` (in the order of the logits),
    ``environment.json``, ``log.txt``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoint.pth`` (to
    resume from), ``model_last.pth`` and ``model_best.pth`` (the bare student), ``model_ema.pth``
    (if its weights are averaged), the students of single epochs in ``epochs/`` (if they are kept)
    and, once finished, ``result.json`` and ``curves.png``.

    Args:
        directory: created if missing.
        resume: whether to resume the run that is there.

    Attributes:
        logger: logs what concerns this run alone.

    Raises:
        ConfigError: the folder holds a run and ``resume`` is false, or the folder cannot be
            created.
        FolderInUseError: another process is using the folder.
    """

    def __init__(self, directory: str | Path, *, resume: bool) -> None:
        self.directory = Path(directory)
        self.checkpoint = self.directory / CHECKPOINT
        self.metrics = self.directory / "metrics.jsonl"
        self.result = self.directory / "result.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"OUTPUT_DIR: the folder cannot be created: {error}") from error
        self._lock = lock_folder(self.directory)
        all_traces = (self.checkpoint, self.metrics, self.result)
        traces = [path.name for path in all_traces if path.exists()]
        if traces and not resume:
            os.close(self._lock)
            raise used_folder(self.directory, traces)
        remove_temporaries(self.directory)
        remove_temporaries(self.directory / KEPT)
        self._log = logging.FileHandler(self.directory / "log.txt")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.logger = logging.LoggerAdapter(logger, {"run": self})
        self._log.addFilter(lambda record: getattr(record, "run", self) is self)
        self._tensorboard: SummaryWriter | None = None

    def __enter__(self) -> RunFolder:
        logger.addHandler(self._log)
        return self

    def __exit__(self, *exception: object) -> None:
        logger.removeHandler(self._log)
        self._log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        os.close(self._lock)

    def traces(self) -> list[str]:
        """Return the names of files that exist only after a run's first checkpoint."""
        later = [self.result, self.directory / "model_best.pth"]
        names = [path.name for path in later if path.exists()]
        # An epoch's metrics are written before its checkpoint.
        return names + [self.metrics.name] * (len(_lines(self.metrics)) > 1)

    def read_result(self) -> dict[str, object] | None:
        """Return the content of ``result.json``; None if it is missing or damaged."""
        try:
            result = json.loads(self.result.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            self.logger.warning("%s is damaged and will be rewritten", self.result)
            return None
        return result if isinstance(result, dict) else None

    def start_metrics(self, epochs: int) -> None:
        """Truncate the metrics to the first ``epochs`` epochs; the rest will be retrained."""
        kept = [record for record in read_metrics(self.metrics) if record["epoch"] <= epochs]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._tensorboard = SummaryWriter(self.directory / "tensorboard", purge_step=epochs + 1)

    def start_kept(self, epochs: int) -> None:
        """Remove the students of epochs that will be retrained: all but the first ``epochs``."""
        for epoch, path in kept_students(self.directory).items():
            if epoch > epochs or epochs == 0:
                path.unlink()

    def keep(self, student: nn.Module, epoch: int) -> None:
        """Save the student of an epoch permanently, as in ``epochs/0010.pth``."""
        save_student(student, self.directory / KEPT / f"{epoch:04d}.pth")

    def add_metrics(self, record: Mapping[str, float]) -> None:
        """Append one epoch to ``metrics.jsonl`` and TensorBoard."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        assert self._tensorboard is not None  # since start_metrics
        for name, value in record.items():
            if name != "epoch":
                self._tensorboard.add_scalar(name, value, record["epoch"])
        self._tensorboard.flush()

    def save_state(self, state: Mapping[str, object]) -> None:
        """Replace the checkpoint to resume from."""
        atomic_save(state, self.checkpoint)

    def save_last(self, student: nn.Module) -> None:
        """Replace ``model_last.pth``."""
        save_student(student, self.directory / "model_last.pth")

    def save_best(self, student: nn.Module) -> None:
        """Replace ``model_best.pth``."""
        save_student(student, self.directory / "model_best.pth")

    def save_average(self, student: nn.Module) -> None:
        """Replace ``model_ema.pth``."""
        save_student(student, self.directory / "model_ema.pth")

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file atomically."""
        write_text(self.directory / name, json.dumps(content, indent=2) + "\n")


def used_folder(directory: Path, traces: Sequence[str]) -> ConfigError:
    """The error for a run that is not resumed, in a folder with the files of another."""
    return ConfigError(
        f"OUTPUT_DIR: {str(directory)!r} holds a run ({', '.join(traces)}); continue it with "
        "--resume, or choose another OUTPUT_DIR"
    )


def kept_students(directory: Path) -> dict[int, Path]:
    """Epoch -> weights file of each student that a run kept (``KEEP_EVERY``), in epoch order."""
    files = (directory / KEPT).glob("*.pth")
    return dict(sorted((int(path.stem), path) for path in files if path.stem.isdecimal()))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the records of a ``metrics.jsonl``; a line truncated by a kill is left out.

    Raises:
        ConfigError: a complete line that is not a record; file and line are named.
    """
    records = []
    for number, line in enumerate(_lines(path), 1):
        try:
            record = dict(json.loads(line))
            int(record["epoch"])
            records.append(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"OUTPUT_DIR: {str(path)!r}: line {number} is damaged; remove that line (its epoch "
                "will be missing from the curves), or choose another OUTPUT_DIR"
            ) from error
    return records


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file; none if it is missing."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    atomic_write(lambda file: file.write(text.encode()), path)


def remove_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what killed processes left of a file, or of all; no other may be using the folder."""
    for path in directory.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):  # as atomic_write names them
        path.unlink(missing_ok=True)
