"""Arguments and output of ``pcka grams``, for classifiers and detectors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pcka.analysis.gram_figure import NOTHING, grams_figure
from pcka.analysis.gram_pairs import GramPair
from pcka.engine.arguments import command_parser, positive
from pcka.engine.config import ConfigError
from pcka.files import atomic_write

SAMPLES = 100  # in a classifier's Gram matrix


def grams_parser() -> argparse.ArgumentParser:
    """The argument parser of ``pcka grams``."""
    parser = command_parser(
        "Grams of teacher and student side by side, as the losses compare them: for a detector "
        "between the patches of each level, for a classifier between images sorted by class. "
        "Writes a picture (PNG) and its values (NPZ).",
        "pcka grams output/pcka --taps p3 p4",
        "pcka grams output/run",
    )
    parser.prog = "pcka grams"
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--weights", type=Path, metavar="W", help="checkpoint of the student (default: the last)"
    )
    parser.add_argument(
        "--taps",
        nargs="+",
        metavar="T",
        help="levels or stages (default: those of PCKA, else all that are compared; all stages)",
    )
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help=f"detector: each with its own rows (1); classifier: in a Gram ({SAMPLES})",
    )
    parser.add_argument(
        "--patch-size",
        type=positive,
        metavar="P",
        help="detector: for all levels (default: the loss's)",
    )
    parser.add_argument(
        "--channel", type=int, metavar="C", help="detector: this one only (default: mean of all)"
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="PATH",
        help="files to write, without suffix (default: grams in the run's folder)",
    )
    parser.add_argument("--device", default="", choices=("auto", "cpu", "cuda"))
    return parser


def chosen_taps(wanted: Sequence[str], there: Sequence[str]) -> list[str]:
    """The requested taps, each once.

    Raises:
        ConfigError: an unknown tap.
    """
    if unknown := [tap for tap in wanted if tap not in there]:
        raise ConfigError(
            f"--taps: {', '.join(unknown)} is not tapped; available: {', '.join(there) or 'none'}"
        )
    return list(dict.fromkeys(wanted))


def write_grams(
    path: str | Path,
    pairs: Mapping[str, GramPair],
    images: Mapping[str, np.ndarray] = NOTHING,
    classes: Mapping[str, int] = NOTHING,
) -> list[Path]:
    """Write ``<path>.png`` (see :func:`grams_figure`) and ``<path>.npz``; print and return them.

    For each group, the latter holds ``<name>.teacher`` and ``<name>.student``, ``(N, N)``, and
    ``<name>.cka``.
    """
    picture, values = (Path(f"{path}{suffix}") for suffix in (".png", ".npz"))
    arrays: dict[str, Any] = {
        f"{name}.{part}": tensor.cpu().numpy()
        for name, pair in pairs.items()
        for part, tensor in (
            ("teacher", pair.teacher),
            ("student", pair.student),
            ("cka", pair.alignment),
        )
    }
    figure = grams_figure(pairs, images, classes)
    atomic_write(lambda file: figure.savefig(file, format="png", dpi=110), picture)
    atomic_write(lambda file: np.savez_compressed(file, **arrays), values)
    for name, pair in pairs.items():
        what = "images" if pair.grid is None else "patches"
        print(f"{name}: CKA {pair.cka:.4f} of {len(pair.student)} {what}")
    print(f"{picture}, {values}")
    return [picture, values]
