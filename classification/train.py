"""Train a classifier: ``python classification/train.py --config-file F --method M [KEY VALUE]``.

With several processes: ``torchrun --nproc-per-node N classification/train.py ...``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from classification.arguments import train_parser
from classification.config import load_config
from classification.pair import pair_settings
from classification.run import run_experiment
from pcka.engine.command import run_command
from pcka.engine.launch import is_first
from pcka.engine.progress import console_log
from pcka.engine.run_folder import CHECKPOINT

logger = logging.getLogger("pcka")


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Train as the arguments say; return the content of ``result.json``.

    With ``--show-taps``, nothing is trained and the result is empty.
    """
    given = train_parser().parse_intermixed_args(arguments)
    with console_log():
        pair, method = pair_settings(given, given.overrides, given.method)
        cfg = load_config(pair, given.overrides, method)
        if given.show_taps:
            from classification.show_taps import tap_table  # not needed for training

            print(tap_table(cfg))
            return {}
        if given.resume and is_first() and not Path(cfg.OUTPUT_DIR, CHECKPOINT).exists():
            logger.info("%s: nothing to resume; starting a new run", cfg.OUTPUT_DIR)
        return run_experiment(cfg, resume=given.resume)


if __name__ == "__main__":
    run_command(
        main, interrupted="repeat the command with --resume to continue after the last epoch"
    )
