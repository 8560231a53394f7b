"""A whole training against a plain loop: nothing of the recipe may be left out unseen."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from classification.models import create_model
from classification.run import prepare_trainers, run_experiment
from pcka.losses import kd_loss

pytestmark = pytest.mark.usefixtures("without_plots")

RECIPE = {
    "SEED": 3,
    "STUDENT.PIXEL_MEAN": "[0.3, 0.3, 0.3]",
    "STUDENT.PIXEL_STD": "[0.4, 0.4, 0.4]",
    "TEACHER.PIXEL_MEAN": "[0.1, 0.1, 0.1]",
    "TEACHER.PIXEL_STD": "[0.2, 0.2, 0.2]",
    "SOLVER.EPOCHS": 4,
    "REPORT": False,
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.MOMENTUM": 0.8,
    "SOLVER.NESTEROV": True,
    "SOLVER.WEIGHT_DECAY": 0.01,
    "SOLVER.GAMMA": 0.3,
    "SOLVER.MILESTONES": "[1, 3]",
    "SOLVER.WARMUP_EPOCHS": 1.5,
    "DISTILL.WARMUP": 0.375,
    "DISTILL.CE.WEIGHT": 0.3,
    "DISTILL.CE.LABEL_SMOOTHING": 0.1,
    "DISTILL.KD.WEIGHT": 0.7,
    "DISTILL.KD.TEMPERATURE": 3.0,
}


def trained_plainly(schedule, teacher, batches_of):
    """The student's state after the recipe, written out."""
    torch.manual_seed(3)
    student = create_model("resnet8", 10).train()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01, fused=True
    )
    steps = 4  # 40 images in batches of 10
    for epoch in range(4):
        for step, (pixels, labels, _) in enumerate(batches_of(epoch)):
            progress = epoch + step / steps
            if schedule == "cosine":
                rate = 0.1 * ((1 + math.cos(math.pi * progress / 4)) / 2)
            else:
                rate = 0.1 * 0.3 ** ((progress >= 1) + (progress >= 3))
            if progress < 1.5:
                rate *= progress / 1.5
            optimizer.param_groups[0]["lr"] = rate
            logits = student((pixels - 0.3) / 0.4)
            ce = F.cross_entropy(logits, labels, label_smoothing=0.1)
            kd = kd_loss(logits, teacher((pixels - 0.1) / 0.2), temperature=3.0)
            loss = 0.3 * ce + min(progress / 1.5, 1.0) * (0.7 * kd)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student.state_dict()


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
def test_a_run_is_a_plain_loop_by_its_recipe_to_the_last_digit(
    tiny_config, random_teacher, tmp_path, schedule
):
    keys = {"TEACHER.WEIGHTS": random_teacher, "SOLVER.SCHEDULE": schedule, **RECIPE}
    cfg = tiny_config("kd", **keys)
    run_experiment(cfg)
    (fresh,) = prepare_trainers([cfg], torch.device("cpu"))
    expected = trained_plainly(
        schedule,
        fresh.distiller.teacher,  # whose batch norms are folded, which rounds otherwise
        lambda epoch: fresh.train_set.training_batches(cfg, epoch),
    )
    state = torch.load(tmp_path / "run" / "model_last.pth", weights_only=True)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
