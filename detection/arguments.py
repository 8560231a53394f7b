"""The detection command lines, kept quick to import; see ``pcka/engine/arguments.py``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from pcka.engine.arguments import Answer, add_runs, command_parser, positive

DIGITS = "configs/detection/digits"
DEMO = "configs/detection/demo"
DEMO_METHODS = ("student", "inherited", "pcka", "pcka_mimic")


def train_parser() -> argparse.ArgumentParser:
    """The command line of ``train_net.py``, with the options of detectron2's scripts."""
    parser = command_parser(
        "Train a detector, by itself or from a teacher.",
        f"python detection/train_net.py --config-file {DIGITS}/pcka.yaml \\\n"
        "    DISTILL.TEACHER.WEIGHTS teacher.pth OUTPUT_DIR output/pcka",
        "python detection/train_net.py --num-gpus 8 --config-file F SOLVER.BASE_LR 0.02",
    )
    parser.add_argument("--config-file", default="", metavar="F", help="YAML configuration")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in OUTPUT_DIR, or start it"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS without training"
    )
    _add_number(parser, "--num-gpus", 1, "GPUs per machine")
    _add_number(parser, "--num-machines", 1, "number of machines")
    _add_number(parser, "--machine-rank", 0, "index of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{_port()}",
        metavar="URL",
        help="address of machine 0 (default: %(default)s)",
    )
    _add_pairs(parser, "opts")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """The command line of ``compare.py``."""
    parser = command_parser(
        "Train several detectors with several seeds and compare them.",
        f"python detection/compare.py --config-files {DIGITS}/student.yaml {DIGITS}/pcka.yaml \\\n"
        "    --seeds 0 1 2 --output output/scenes_compared DISTILL.TEACHER.WEIGHTS teacher.pth",
    )
    parser.add_argument(
        "--config-files",
        nargs="+",
        type=Path,
        required=True,
        metavar="F",
        help="YAML configurations; the others are compared with the first",
    )
    add_runs(parser, seeds=(0, 1, 2), output="output/comparison")
    parser.add_argument(
        "--launcher",
        default=shlex.quote(sys.executable),
        help="command that starts a run, e.g. 'torchrun --nproc-per-node 8' (default: %(default)s)",
    )
    _add_pairs(parser, "overrides")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The command line of ``export.py``."""
    parser = command_parser(
        "Export a student for plain detectron2.",
        "python detection/export.py --config-file output/pcka/config.yaml \\\n"
        "    --weights output/pcka/model_final.pth --output exported",
    )
    parser.add_argument("--config-file", metavar="F", required=True, help="the run's config.yaml")
    parser.add_argument("--weights", metavar="W", required=True, help="a checkpoint of the run")
    parser.add_argument("--output", metavar="DIR", required=True, help="output folder")
    _add_pairs(parser, "overrides")
    return parser


def doctor_parser() -> argparse.ArgumentParser:
    """The command line of ``pcka doctor`` for detectors and segmenters."""
    parser = command_parser(
        "Will this machine and this configuration of a detector or segmenter train? Prints one "
        "line per check: ok, warn or FAIL with what to do, or - if it could not be made.",
        f"pcka doctor --config-file {DIGITS}/pcka.yaml DISTILL.TEACHER.WEIGHTS teacher.pth",
    )
    parser.prog = "pcka doctor"
    parser.add_argument("--config-file", metavar="F", required=True, help="YAML configuration")
    _add_pairs(parser, "overrides")
    return parser


def report_parser() -> argparse.ArgumentParser:
    """The command line of ``report.py``."""
    parser = command_parser(
        "Report on a detector's run: a self-contained report.html, and report.json.",
        "pcka report output/pcka --teacher --baseline output/student",
    )
    parser.prog = "pcka report"
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the report (default: the run's)"
    )
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="also evaluate the teacher on the test set (one pass)",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="another run to compare the metrics with"
    )
    _add_number(parser, "--images", 4, "images to draw detections on", positive)
    return parser


def demo_parser() -> argparse.ArgumentParser:
    """The command line of ``demo.py``; unknown arguments are ``KEY VALUE`` pairs."""
    parser = command_parser("Distil a detector on scenes of digits.")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(DEMO_METHODS),
        metavar="M",
        help=f"files of --configs (default: {' '.join(DEMO_METHODS)})",
    )
    parser.add_argument(
        "--configs",
        type=Path,
        default=Path(__file__).parents[1] / DEMO,
        metavar="DIR",
        help=f"folder of teacher.yaml and the methods (default: {DEMO})",
    )
    _add_number(parser, "--steps", 200, "of a student; a teacher takes twice as many", positive)
    add_runs(parser, seeds=(0,), output="output/detection")
    return parser


PARSERS = {
    "train_net": train_parser,
    "compare": compare_parser,
    "export": export_parser,
    "doctor": doctor_parser,
    "report": report_parser,
    "demo": demo_parser,
}


def _add_number(
    parser: argparse.ArgumentParser,
    option: str,
    default: int,
    text: str,
    of: Callable[[str], int] = int,
) -> None:
    parser.add_argument(
        option, type=of, default=default, metavar="N", help=f"{text} (default: %(default)s)"
    )


def _add_pairs(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--help-keys", action=Answer, const=_keys, help="print this project's KEYs, with defaults"
    )
    parser.add_argument(name, metavar="KEY VALUE", nargs="*", help="keys that override the file's")


def _port() -> int:
    """The same port for every process of a user, as in detectron2."""
    return 2**15 + 2**14 + os.getuid() % 2**14


def _keys() -> str:
    from detection.help_keys import all_keys  # imports detectron2

    return all_keys()
