"""Image classification: models, data, configuration, and training by distillation."""

import sys
from pathlib import Path

from pcka.extras import require_packages

# The commands need all of them; who imports a part, such as the models, needs what that imports.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    require_packages(
        "fvcore", "matplotlib", "PIL", "scipy", "sklearn", "tensorboard", "torchvision", "tqdm",
        "yaml", extra="train",
    )  # fmt: skip
