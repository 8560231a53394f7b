"""Train a classifier: ``python classification/train.py --config-file F --method M [KEY VALUE]``.

Several processes: ``torchrun --nproc-per-node N classification/train.py ...``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from classification.config import config_arguments, load_config
from classification.run import run_experiment
from pcka.engine.command import run_command
from pcka.engine.progress import console_log


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Train as the arguments say; return the content of ``result.json``.

    With ``--show-taps`` nothing is trained, and there is none.
    """
    parser = config_arguments("Train a student, by itself or from a teacher.")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in OUTPUT_DIR, or start it"
    )
    parser.add_argument(
        "--method", default="", metavar="M", help="what to train by: a name that --list prints"
    )
    parser.add_argument(
        "--show-taps", action="store_true", help="print the taps of both models, and end"
    )
    given = parser.parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides, given.method)
    if given.show_taps:
        from classification.show_taps import tap_table  # a training does not

        print(tap_table(cfg))
        return {}
    with console_log():
        return run_experiment(cfg, resume=given.resume)


if __name__ == "__main__":
    run_command(
        record(main), interrupted="the same command with --resume goes on after the last epoch"
    )
