"""Image classification: models, data, configuration, and training by distillation."""

import sys
from pathlib import Path

from pcka.extras import require_packages

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # run as a command
    from classification.arguments import PARSERS
    from pcka.engine.arguments import answer_help

    answer_help(PARSERS, Path(sys.argv[0]).stem, sys.argv[1:])
    # Commands need all of them; importing one part, such as the models, needs only its own.
    require_packages(
        "fvcore", "jinja2", "matplotlib", "PIL", "scipy", "sklearn", "tensorboard", "torchvision",
        "tqdm", "yaml", extra="train",
    )  # fmt: skip
