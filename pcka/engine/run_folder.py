"""What a run writes into its OUTPUT_DIR, and what it finds there when it is continued."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from pcka.checkpoint import save_student
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import lock_folder
from pcka.files import atomic_save, atomic_write

logger = logging.getLogger("pcka")

CHECKPOINT = "checkpoint.pth"
KEPT = "epochs"  # folder of the students of single epochs


class RunFolder:
    """The files of one run; a context manager that holds the folder for this process alone.

    A run's folder holds ``config.yaml``, ``classes.txt`` (in the order of the logits),
    ``environment.json``, ``log.txt``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoint.pth`` (to
    continue from), ``model_last.pth`` and ``model_best.pth`` (the bare student), ``model_ema.pth``
    (where its weights are averaged), the students of single epochs in ``epochs/`` (where they are
    kept) and, when finished, ``result.json`` and ``curves.png``.

    Args:
        directory: made where it is missing.
        resume: continue what is there.

    Attributes:
        logger: for what concerns this run and none beside it.

    Raises:
        ConfigError: a run is there and ``resume`` is false, or no folder can be made there.
        FolderInUseError: another process is at work there.
    """

    def __init__(self, directory: str | Path, *, resume: bool) -> None:
        self.directory = Path(directory)
        self.checkpoint = self.directory / CHECKPOINT
        self.metrics = self.directory / "metrics.jsonl"
        self.result = self.directory / "result.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"OUTPUT_DIR: no folder can be made there: {error}") from error
        self._lock = lock_folder(self.directory)
        all_traces = (self.checkpoint, self.metrics, self.result)
        traces = [path.name for path in all_traces if path.exists()]
        if traces and not resume:
            os.close(self._lock)
            raise ConfigError(
                f"OUTPUT_DIR: {str(self.directory)!r} holds a run ({', '.join(traces)}); continue "
                "it with --resume, or choose another OUTPUT_DIR"
            )
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
        """Return the names of files that a run has only after its first checkpoint."""
        later = [self.result, self.directory / "model_best.pth"]
        names = [path.name for path in later if path.exists()]
        # Of an epoch the metrics are written before the checkpoint.
        return names + [self.metrics.name] * (len(_lines(self.metrics)) > 1)

    def read_result(self) -> dict[str, object] | None:
        """Return the content of ``result.json``; None where it is missing or damaged."""
        try:
            result = json.loads(self.result.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            self.logger.warning("%s is damaged, and is written anew", self.result)
            return None
        return result if isinstance(result, dict) else None

    def start_metrics(self, epochs: int) -> None:
        """Cut the metrics back to the first ``epochs`` epochs; the rest will be trained anew."""
        kept = [record for record in read_metrics(self.metrics) if record["epoch"] <= epochs]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._tensorboard = SummaryWriter(self.directory / "tensorboard", purge_step=epochs + 1)

    def start_kept(self, epochs: int) -> None:
        """Remove the students of epochs that will be trained anew: all but the first ``epochs``."""
        for epoch, path in kept_students(self.directory).items():
            if epoch > epochs or epochs == 0:
                path.unlink()

    def keep(self, student: nn.Module, epoch: int) -> None:
        """Write the student of an epoch, ``epochs/0010.pth``, which stays."""
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
        """Replace the checkpoint to continue from."""
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
        """Write a JSON file, never half."""
        write_text(self.directory / name, json.dumps(content, indent=2) + "\n")


def kept_students(directory: Path) -> dict[int, Path]:
    """Epoch -> weights of the students that a run kept (``KEEP_EVERY``), the first one first."""
    files = (directory / KEPT).glob("*.pth")
    return dict(sorted((int(path.stem), path) for path in files if path.stem.isdecimal()))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the records of a ``metrics.jsonl``; a line torn by a kill is left out.

    Raises:
        ConfigError: a whole line that is no record; file and line are named.
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
                "will be missing in the curves), or choose another OUTPUT_DIR"
            ) from error
    return records


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file, none where it is missing."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def write_text(path: Path, text: str) -> None:
    """Write a text file, never half."""
    atomic_write(lambda file: file.write(text.encode()), path)


def remove_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what killed processes left of a file, or of all; no other may be at work there."""
    for path in directory.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):  # as atomic_write names them
        path.unlink(missing_ok=True)
