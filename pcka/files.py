"""Files: written atomically, and read without running code that they may contain."""

from __future__ import annotations

import os
import re
import secrets
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pcka.extras import optional_package

SAFETENSORS = ".safetensors"  # files with this suffix are written and read by that package
CONTAINERS = ("model", "state_dict", "model_state_dict")  # keys of weights in files that hold more
_ZIP = b"PK\x03\x04"  # the first bytes of a torch.save file


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


def atomic_write(write: Callable[[BinaryIO], object], path: str | Path) -> None:
    """Write a file atomically: ``path`` is either the old file or the complete new one.

    The bytes go to a hidden ``.<name>.<random>.tmp`` next to it, are synced to disk, and replace
    ``path`` in one step. A killed process may leave that temporary file behind; nothing reads it.

    Args:
        write: called with the open file, to write the content into it.
        path: file to write; missing folders are created.

    Raises:
        OSError: it cannot be written, for lack of space or permission; the message names ``path``.
        KeyboardInterrupt: on Ctrl-C, even if ``write`` turns it into another error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save replaces the file's error, or Ctrl-C during the write, by an error of its own
        # without the path.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{cause.strerror}; not written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_save(obj: object, path: str | Path) -> None:
    """Save an object with ``torch.save``, through :func:`atomic_write`."""
    atomic_write(partial(torch.save, obj), path)


def load_file(path: str | Path, *, mmap: bool = False) -> object:
    """Load a ``torch.save`` or safetensors file to the CPU, without running code it may contain.

    The checksums that ``torch.save`` writes are verified first, which ``torch.load`` does not do.
    Formats without any (safetensors, files older than torch 1.6) are read as they are.

    Args:
        path: file to load.
        mmap: memory-map the tensors of a ``torch.save`` file instead of reading them.

    Raises:
        CheckpointError: the file holds objects other than tensors and plain containers (which are
            not created), is damaged, or is not a checkpoint.
        ImportError: ``path`` is a ``.safetensors`` file and that package is not installed.
        OSError: it cannot be opened.
    """
    if Path(path).suffix == SAFETENSORS:
        return _load_safetensors(Path(path))
    with Path(path).open("rb") as file:
        try:
            _check_sums(file)
            source = str(path) if mmap else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # arbitrary bytes make torch.load raise nearly anything
            raise CheckpointError(_explain(error, path)) from error


def _check_sums(file: BinaryIO) -> None:
    """Refuse a zip archive whose content does not match its checksums."""
    is_zip = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    if not is_zip:
        return
    with zipfile.ZipFile(file) as archive:
        # torch.serialization.set_crc32_options(False) writes zeros in place of them.
        written = any(entry.CRC for entry in archive.infolist())
        if written and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
    file.seek(0)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = optional_package("safetensors.torch")
    content = path.read_bytes()
    try:
        return safetensors.load(content)
    except Exception as error:  # a type of the package's own
        raise CheckpointError(_damaged(error, path, "safetensors")) from error


def _explain(error: Exception, path: str | Path) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is None:
        return _damaged(error, path, "torch.save")
    rewrite = (
        f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        "c = c if isinstance(c, dict) else {'model': c}; "  # a whole model
        "torch.save({k: getattr(c[k], 'state_dict', lambda: c[k])() "
        f"for k in {CONTAINERS} if k in c}}, 'weights.pth')"
    )
    return (
        f"path: expected tensors and plain containers, {str(path)!r} also holds "
        f"{refused[1]}, and loading that would run code from the file. If, and only if, you trust "
        f'its author, rewrite it once without: python -c "{rewrite}"'
    )


def _damaged(error: Exception, path: str | Path, kind: str) -> str:
    return (
        f"path: expected a {kind} file, {str(path)!r} is damaged or something else "
        f"({type(error).__name__}); get it again, or remove it if one of your runs wrote it"
    )
