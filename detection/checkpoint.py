"""detectron2's checkpointer, made unable to run code from the files it reads."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from pcka.engine.config import ConfigError
from pcka.engine.run_folder import write_text
from pcka.files import CheckpointError, atomic_save, load_file

# What the model zoo's pickles are made of: arrays and plain containers.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}


class WeightsError(ConfigError):
    """Weights that cannot be used; the message names the file and a fix."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"the pickle asks for {module}.{name}; only arrays and plain containers are read "
                "from a .pkl file. If you trust it, convert it to a .pth file of tensors"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


class SafeCheckpointer(DetectionCheckpointer):
    """A ``DetectionCheckpointer`` that reads safely and replaces files atomically.

    The saved ``"model"`` is the model's own ``state_dict``, so plain detectron2 can load it.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` to a temporary file, then move it into place."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = f"{self.save_dir}/{name}.pth"
        atomic_save({"model": self.model.state_dict(), **parts, **kwargs}, path)
        self.tag_last_checkpoint(f"{name}.pth")
        self.logger.info("Saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Atomically record the checkpoint from which ``--resume`` continues."""
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def way_on(self) -> str:
        """Return advice for the case that the last checkpoint cannot be read."""
        last, folder = self.get_checkpoint_file(), Path(self.save_dir)
        older = (path for path in folder.glob("*.pth") if str(path) != last)
        for path in sorted(older, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                load_file(path)
            except ValueError:
                continue
            return (
                f"{path.name} next to it is intact: to resume from it, write that name into "
                f"{folder / 'last_checkpoint'}"
            )
        return f"no other is intact: remove {folder / 'last_checkpoint'} to start over"

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights and checkpointables; return the remaining content of the file.

        Raises:
            WeightsError: the file cannot be used, or none of its weights fits the model.
            CheckpointError: the file is damaged, or weights are not finite.
        """
        try:
            rest: dict[str, Any] = super().load(path, checkpointables)
        except CheckpointError as error:
            raise CheckpointError(_named(path, error)) from error
        if path and not self._fitted:
            raise WeightsError(
                f"{path}: none of its weights matches the model in name and shape. Does the "
                "configuration describe this model?"
            )
        return rest

    def read(self, path: str) -> dict[str, Any]:
        """Return the content of a file or URL, the weights under ``"model"``; load nothing.

        Raises:
            WeightsError: it cannot be read, or holds no weights.
            CheckpointError: the file is damaged.
        """
        try:
            return self._load_file(self.path_manager.get_local_path(path))
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error}") from error

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        found = super()._load_model(checkpoint)
        unfilled = {*found.missing_keys, *(name for name, *_ in found.incorrect_shapes)}
        state = self.model.state_dict()
        self._fitted = state.keys() - unfilled
        broken = [n for n in state if n in self._fitted and _no_weight(n, state[n])]
        if broken:
            raise CheckpointError(
                f"{len(broken)} of its weights are NaN, infinite or negative variances: "
                f"{', '.join(broken[:3])}; use a file from a run that did not diverge"
            )
        return found

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return _read_zoo_pickle(filename)
        loaded = _mapping(filename, load_file(filename))
        if "state_dict" in loaded:
            raise WeightsError(
                f"{filename}: has its weights under 'state_dict', like OpenMMLab's files; "
                "tools/convert_mmdet.py renames a teacher's weights for detectron2"
            )
        if "model_state" in loaded:  # from pycls; detectron2 matches its names, too
            loaded = {"model": loaded["model_state"], "matching_heuristics": True}
        found = loaded if "model" in loaded else {"model": loaded}
        _check_arrays(filename, found["model"], Tensor)
        return found


def load_weights(model: nn.Module, path: str, *, prefixes: Iterable[str] = ("",)) -> None:
    """Load a detector's weights; the file must hold all those under ``prefixes``.

    Args:
        model: receives the weights; its parameter names are detectron2's.
        path: file or URL that detectron2's checkpointer understands.
        prefixes: prefixes of the weights that must be loaded.

    Raises:
        WeightsError: there is no such file, or required weights are missing or have other shapes.
        CheckpointError: the file is damaged, or weights are not finite.
    """
    wanted = [name for name in model.state_dict() if name.startswith(tuple(prefixes))]
    checkpointer = SafeCheckpointer(model)
    checkpoint = checkpointer.read(path)
    try:
        result = checkpointer._load_model(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(_named(path, error)) from error
    shapes = {name: (got, own) for name, got, own in result.incorrect_shapes}
    missing = [name for name in wanted if name in set(result.missing_keys) | shapes.keys()]
    if missing:
        listed = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        differing = f"; shapes differ (file, model): {dict(list(shapes.items())[:3])}"
        raise WeightsError(
            f"{path}: {len(missing)} of {len(wanted)} weights are missing: {listed}"
            f"{differing if shapes else ''}. Does the configuration describe this model?"
        )


def _named(path: str, error: CheckpointError) -> str:
    """The message, prefixed with the file's name unless it already contains it."""
    return str(error) if path in str(error) else f"{path}: {error}"


def _no_weight(name: str, value: Tensor) -> bool:
    if not value.is_floating_point():
        return False
    variance = name.rpartition(".")[2] == "running_var"
    return not bool(value.isfinite().all()) or (variance and bool((value < 0).any()))


def _mapping(filename: str, found: object, under: str = "") -> dict[str, Any]:
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise WeightsError(f"{filename}: expected a mapping of weights{under}, got {kind}")
    return found


def _check_arrays(filename: str, weights: object, kind: type) -> None:
    """Refuse anything but a mapping of names to arrays, before detectron2 reads it."""
    for name, value in _mapping(filename, weights, " under 'model'").items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise WeightsError(
                f"{filename}: expected a {kind.__name__} under every name, got "
                f"{type(value).__name__} under {name!r}"
            )


def _read_zoo_pickle(filename: str) -> dict[str, Any]:
    """Read a ``.pkl`` from detectron2's model zoo, or from Caffe2's with Caffe2's names."""
    try:
        with open(filename, "rb") as file:
            data = ArrayUnpickler(file, encoding="latin1").load()
    except WeightsError as error:
        raise WeightsError(f"{filename}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # unpickling arbitrary bytes can raise nearly anything
        raise WeightsError(f"{filename}: is damaged or not a pickle: {error}") from error
    data = _mapping(filename, data)
    if isinstance(data.get("model"), dict):
        _check_arrays(filename, data["model"], np.ndarray)
        return data
    blobs = _mapping(filename, data.get("blobs", data), " under 'blobs'")
    arrays = {
        name: value
        for name, value in blobs.items()
        if isinstance(value, np.ndarray) and not str(name).endswith("_momentum")
    }
    if not arrays:
        raise WeightsError(f"{filename}: has no arrays, only {', '.join(map(str, blobs))}")
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
