"""Object detection: PCKA distillation of detectron2 detectors."""

import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # run as a script
    from detection.arguments import PARSERS
    from pcka.engine.arguments import answer_help

    answer_help(PARSERS, Path(sys.argv[0]).stem, sys.argv[1:])
