"""How much one training takes in, and what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINING = """
import json, sys
from classification.train import main
main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


def test_one_training_imports_few_modules_and_no_loss_model_or_data_set_but_its_own(
    digits_config, tiny_overrides, random_teacher
):
    words = tiny_overrides(**{"TEACHER.WEIGHTS": random_teacher, "SOLVER.EPOCHS": 1})
    given = ["--config-file", str(digits_config), "--method", "kd", *words]
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, *given], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    modules = json.loads(done.stdout.splitlines()[-1])
    own = [name for name in modules if name.split(".")[0] in ("pcka", "classification")]
    assert len(own) <= 80, own
    assert {"pcka.losses.kd", "pcka.losses.cross_entropy"} < set(own)
    others = ("losses.reviewkd", "models.vgg", "models.torchvision_zoo", "data.cifar", "sweep")
    assert not [name for name in own if name.endswith(others)]
