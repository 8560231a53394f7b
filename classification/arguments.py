"""The command lines of classification, quick to import: see ``pcka/engine/arguments.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from classification.catalog import catalog
from pcka.engine.arguments import Answer, add_runs, command_parser, positive

EXPORTED = (".pth", ".safetensors", ".onnx")
DIGITS = "configs/classification/digits/resnet20_resnet8.yaml"


def config_arguments(
    description: str, *examples: str, required: bool = True
) -> argparse.ArgumentParser:
    """Return a parser for ``--config-file F [KEY VALUE ...]``; use ``parse_intermixed_args``.

    ``--list`` prints the available configurations and methods, ``--help-keys`` all keys.
    """
    parser = command_parser(description, *examples)
    parser.add_argument("--config-file", metavar="F", required=required, help="YAML configuration")
    parser.add_argument(
        "--list", action=Answer, const=catalog, help="print the configurations and methods"
    )
    parser.add_argument(
        "--help-keys", action=Answer, const=_keys, help="print every KEY with its default"
    )
    parser.add_argument(
        "overrides", metavar="KEY VALUE", nargs="*", help="keys that override the file's"
    )
    return parser


def train_parser() -> argparse.ArgumentParser:
    """The command line of ``train.py``."""
    parser = config_arguments(
        "Train a student, alone or from a teacher. Give a configuration file, or name data and "
        "models with --data, --teacher and --student; the other settings are proposed.",
        "python classification/train.py --data flowers --teacher torchvision/resnet34 \\\n"
        "    --student torchvision/mobilenet_v3_small",
        f"python classification/train.py --config-file {DIGITS} \\\n"
        "    --method kd SOLVER.EPOCHS 40",
        required=False,
    )
    _add_pair(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in OUTPUT_DIR, or start it"
    )
    _add_method(parser)
    parser.add_argument(
        "--show-taps", action="store_true", help="print the taps of both models and exit"
    )
    return parser


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        default="",
        metavar="M",
        help="training method: a name from --list (default: the file's, or ce; with --data and "
        "--teacher, kd_fcka)",
    )


def _add_pair(parser: argparse.ArgumentParser) -> None:
    """Add the options that replace a configuration file."""
    group = parser.add_argument_group("instead of --config-file")
    group.add_argument(
        "--data", metavar="FOLDER", help="images: train/<class>/* and, if present, test/<class>/*"
    )
    group.add_argument("--student", default="", metavar="NAME", help="model, e.g. timm/resnet18")
    group.add_argument("--teacher", default="", metavar="NAME", help="model (default: none)")
    group.add_argument(
        "--weights",
        default="",
        metavar="W",
        help="checkpoint of the teacher (default: it is trained first)",
    )


def compare_parser() -> argparse.ArgumentParser:
    """The command line of ``compare.py``."""
    parser = config_arguments(
        "Train several methods with several seeds, and compare them.",
        f"python classification/compare.py --config-file {DIGITS} \\\n"
        "    --methods ce kd rcka_short --seeds 0 1 2 --output output/digits SOLVER.EPOCHS 10",
        required=False,
    )
    _add_pair(parser)
    compared = parser.add_mutually_exclusive_group(required=True)
    compared.add_argument("--methods", nargs="+", metavar="M", help="names from --list")
    compared.add_argument(
        "--variants", type=Path, metavar="F", help="YAML file of methods with their own settings"
    )
    add_runs(parser, seeds=(0, 1, 2), output="output/comparison")
    parser.add_argument(
        "--together",
        type=positive,
        default=8,
        metavar="N",
        help="students trained side by side (default: %(default)s)",
    )
    parser.add_argument("--no-costs", action="store_true", help="do not measure step costs")
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    """The command line of ``evaluate.py``."""
    parser = config_arguments(
        "Evaluate a classifier on the evaluation images of a configuration.",
        "python classification/evaluate.py --config-file output/run/config.yaml \\\n"
        "    --weights output/run/model_best.pth",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="W",
        help="checkpoint of the model (default: the configuration's)",
    )
    parser.add_argument(
        "--role",
        choices=("student", "teacher"),
        default="student",
        help="which model to evaluate (default: %(default)s)",
    )
    _add_recalibration(parser, "and write <name>_recalibrated.pth next to the weights")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html and report.json there, comparing student and teacher",
    )
    return parser


def _add_recalibration(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--recalibrate-bn",
        nargs="?",
        type=positive,
        const=2048,
        default=0,
        metavar="N",
        help="re-estimate batch norm's running statistics on N training images (default: "
        f"%(const)s), {purpose}",
    )


def doctor_parser() -> argparse.ArgumentParser:
    """The command line of ``pcka doctor``, except for detectors and segmenters."""
    parser = config_arguments(
        "Will this machine and this configuration train? Prints one line per check: ok, warn or "
        "FAIL with what to do, or - if it could not be made. The file may also be a detector's "
        "or segmenter's, with KEY VALUE pairs as the only other arguments.",
        "pcka doctor",
        f"pcka doctor --config-file {DIGITS} --method kd_fcka",
        "pcka doctor --data flowers --teacher torchvision/resnet34 \\\n"
        "    --student torchvision/mobilenet_v3_small",
        "pcka doctor --config-file configs/detection/digits/pcka.yaml \\\n"
        "    DISTILL.TEACHER.WEIGHTS teacher.pth",
        required=False,
    )
    parser.prog = "pcka doctor"
    _add_pair(parser)
    _add_method(parser)
    return parser


def report_parser() -> argparse.ArgumentParser:
    """The command line of ``report.py``."""
    parser = command_parser(
        "Report on a classifier's run: a self-contained report.html, and report.json.",
        "pcka report output/run --baseline output/ce",
    )
    parser.prog = "pcka report"
    parser.add_argument("run", type=Path, metavar="RUN", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the report (default: the run's)"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="another run to compare the student with"
    )
    add_device(parser)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, which overrides the run's."""
    parser.add_argument(
        "--device", default="", choices=("auto", "cpu", "cuda"), help="default: the run's"
    )


def export_parser() -> argparse.ArgumentParser:
    """The command line of ``export.py``."""
    parser = config_arguments(
        "Export the student of a configuration.",
        "python classification/export.py --config-file output/run/config.yaml \\\n"
        "    --weights output/run/model_best.pth --output student.onnx --with-normalization",
    )
    parser.add_argument("--weights", metavar="W", required=True, help="checkpoint of the student")
    parser.add_argument("--output", metavar="OUT", required=True, help=" | ".join(EXPORTED))
    parser.add_argument(
        "--with-normalization",
        action="store_true",
        help=".onnx: the graph takes pixels in [0, 1] instead of normalised ones",
    )
    _add_recalibration(parser, "before the export")
    return parser


def demo_parser() -> argparse.ArgumentParser:
    """The command line of ``demo.py``."""
    parser = command_parser("Compare distillation methods on digits.")
    add_runs(parser, seeds=(0, 1, 2), output="output/demo")
    return parser


PARSERS = {
    "train": train_parser,
    "compare": compare_parser,
    "evaluate": evaluate_parser,
    "doctor": doctor_parser,
    "report": report_parser,
    "export": export_parser,
    "demo": demo_parser,
}


def _keys() -> str:
    from classification.help_keys import all_keys  # imports torch, for the losses' keys

    return all_keys()
