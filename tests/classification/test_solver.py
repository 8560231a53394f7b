"""Optimizers, rates, clipping and accumulation, each against torch's own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from classification.models import create_model
from classification.models.registry import register
from classification.run import prepare_trainers, run_experiment
from classification.solver import (
    average_decay,
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    read_rate_from,
)
from classification.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_plots")

ONE_CYCLE = {"SOLVER.SCHEDULE": "onecycle", "SOLVER.WARMUP_EPOCHS": 0}
MODERN = {
    **ONE_CYCLE,
    "SOLVER.OPTIMIZER": "adamw",
    "SOLVER.BASE_LR": 0.002,
    "SOLVER.BETAS": "[0.8, 0.95]",
    "SOLVER.EPS": 1e-6,
    "SOLVER.WEIGHT_DECAY": 0.1,
    "SOLVER.DECAY_NORMS_AND_BIASES": False,
    "SOLVER.CLIP_GRADIENTS": 0.5,
    "SOLVER.ACCUMULATE": 2,
    "SOLVER.EMA_DECAY": 0.6,
}
BATCHES, UPDATES = 4, 2  # of an epoch: 40 images in batches of 10, two of them for an update


@register("resnet8_solver")
def with_group_norm(classes):
    """Without batch norm a batch in two halves is the batch."""
    model = create_model("resnet8", classes)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.GroupNorm(4, module.num_features))
    return model


def rates_of(scheduler, optimizer, updates):
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(updates - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def own_rates(cfg, updates):
    """The rates of a run of so many updates an epoch."""
    epochs = cfg.SOLVER.EPOCHS
    return [learning_rate(cfg, i / updates, 1 / updates) for i in range(epochs * updates)]


@pytest.mark.parametrize(("rise", "div", "final"), [(0.3, 25, 1e4), (0.0, 5, 2), (1.0, 10, 1)])
@pytest.mark.parametrize(("epochs", "updates"), [(4, 7), (1, 2)])
def test_one_cycle_is_torchs_update_by_update(tiny_config, rise, div, final, epochs, updates):
    cfg = tiny_config(
        **ONE_CYCLE,
        **{"SOLVER.EPOCHS": epochs, "SOLVER.BASE_LR": 0.4, "SOLVER.ONECYCLE_RISE": rise},
        **{"SOLVER.ONECYCLE_DIV": div, "SOLVER.ONECYCLE_FINAL_DIV": final},
    )
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    settings = {"pct_start": rise, "div_factor": div, "final_div_factor": final}
    scheduler = OneCycleLR(
        optimizer, 0.4, total_steps=epochs * updates, cycle_momentum=False, **settings
    )
    expected = rates_of(scheduler, optimizer, epochs * updates)
    assert own_rates(cfg, updates) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_of_a_single_update_has_a_rate(tiny_config):
    cfg = tiny_config(**ONE_CYCLE, **{"SOLVER.EPOCHS": 1, "SOLVER.ONECYCLE_RISE": 1})
    assert own_rates(cfg, 1) == [cfg.SOLVER.BASE_LR]


def test_a_cosine_with_a_floor_is_torchs_update_by_update(tiny_config):
    keys = {"SOLVER.SCHEDULE": "cosine", "SOLVER.WARMUP_EPOCHS": 0, "SOLVER.EPOCHS": 3}
    cfg = tiny_config(**keys, **{"SOLVER.BASE_LR": 0.4, "SOLVER.MIN_LR": 0.1})
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.4)
    expected = rates_of(CosineAnnealingLR(optimizer, 3 * 5, eta_min=0.1), optimizer, 3 * 5)
    assert own_rates(cfg, 5) == pytest.approx(expected, rel=1e-9)
    assert learning_rate(cfg, 3) == pytest.approx(0.1)


def test_norms_and_biases_may_be_exempt_from_weight_decay(tiny_config):
    keys = {"SOLVER.WEIGHT_DECAY": 0.5, "SOLVER.BASE_LR": 1.0, "SOLVER.MOMENTUM": 0}
    model = create_model("resnet8", 10)
    before = copy.deepcopy(model)
    cfg = tiny_config(**keys, **{"SOLVER.DECAY_NORMS_AND_BIASES": False})
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, ours), old in zip(model.named_parameters(), before.parameters(), strict=True):
        of_norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
        expected = old if of_norm or name.endswith("bias") else old / 2
        torch.testing.assert_close(ours, expected, msg=name)
    (group,) = build_optimizer(tiny_config(**keys), model).param_groups
    assert group["weight_decay"] == 0.5 and len(group["params"]) == len([*model.parameters()])


def test_what_a_timm_model_names_is_exempt_as_well(tiny_config):
    student, trained = nn.Module(), nn.Module()
    student.position = nn.Parameter(torch.ones(1, 4, 8))
    student.table = nn.Parameter(torch.ones(2, 2))
    student.no_weight_decay = lambda: {"position"}
    trained.student = student
    cfg = tiny_config(**{"SOLVER.DECAY_NORMS_AND_BIASES": False})
    decayed, spared = build_optimizer(cfg, trained).param_groups
    assert decayed["params"] == [student.table]
    assert spared["params"] == [student.position] and spared["weight_decay"] == 0


@pytest.mark.parametrize("keys", [{}, {"SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 0.01}])
def test_what_is_made_before_a_recording_is_what_a_first_step_starts_from(tiny_config, keys):
    cfg = tiny_config(**keys)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(cfg, model) for model in models]
    made = optimizer_tensors(optimizers[1])
    for optimizer, model in zip(optimizers, models, strict=True):
        for seed in range(3):
            torch.manual_seed(seed)
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    states = optimizers[1].state.values()
    kept = {id(value) for state in states for value in state.values()}
    assert {id(tensor) for tensor in made} == kept  # in place, all of it


def test_the_rate_is_read_where_it_is_written(tiny_config):
    rate, model = torch.tensor(0.0), nn.Linear(2, 2)
    optimizer = build_optimizer(tiny_config(**{"SOLVER.OPTIMIZER": "adamw"}), model)
    read_rate_from(rate, optimizer)
    before = model.weight.clone()
    for value in (0.0, 0.1):
        rate.fill_(value)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight, before) == (value == 0)


def test_the_decay_of_the_average_rises_to_its_value(tiny_config):
    cfg = tiny_config(**{"SOLVER.EMA_DECAY": 0.9})
    decays = [average_decay(cfg, updates) for updates in (0, 1, 7, 26, 31, 1000)]
    assert decays == pytest.approx([0, 1 - 2 ** (-2 / 3), 0.75, 1 - 1 / 9, 0.9, 0.9], abs=1e-2)
    assert decays[2] == pytest.approx(0.75) and decays[-1] == 0.9


def trained_plainly(cfg, batches_of, epochs):
    """Student, average, and norms of the gradients after the recipe, written out with torch's."""
    torch.manual_seed(cfg.SEED)
    student = create_model("resnet8", 10).train()
    groups = [
        {"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    average, norms = {}, []
    scheduler = OneCycleLR(
        optimizer, [0.002] * 2, total_steps=epochs * UPDATES, cycle_momentum=False
    )
    statistics = [
        torch.tensor(x)[:, None, None] for x in (cfg.STUDENT.PIXEL_MEAN, cfg.STUDENT.PIXEL_STD)
    ]
    for epoch in range(epochs):
        for step, (pixels, labels, _) in enumerate(batches_of(epoch)):
            logits = student((pixels - statistics[0]) / statistics[1])
            (nn.functional.cross_entropy(logits, labels) / 2).backward()
            if step % 2 == 0:
                continue
            norms.append(nn.utils.clip_grad_norm_(student.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
            if len(norms) < epochs * UPDATES:
                scheduler.step()
            decay = min(0.6, 1 - len(norms) ** (-2 / 3))
            for name, value in student.state_dict().items():
                old = average.get(name, value)
                average[name] = decay * old + (1 - decay) * value
                if not value.is_floating_point():
                    average[name] = value
                average[name] = average[name].clone()
    return student.state_dict(), average, norms


def test_a_run_by_adamw_is_a_plain_loop_with_torchs_own_parts(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "pcka")
    cfg = tiny_config("ce", **MODERN, **{"TEACHER.NAME": "", "SOLVER.EPOCHS": 3})
    result = run_experiment(cfg)
    (fresh,) = prepare_trainers([cfg], torch.device("cpu"))
    student, average, norms = trained_plainly(
        cfg, lambda epoch: fresh.train_set.training_batches(cfg, epoch), 3
    )
    folder = tmp_path / "run"
    for name, expected in (("model_last.pth", student), ("model_ema.pth", average)):
        state = torch.load(folder / name, weights_only=True)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    means = [sum(norms[i : i + UPDATES]) / UPDATES for i in range(0, len(norms), UPDATES)]
    assert [record["gradient_norm"] for record in records] == pytest.approx(means, rel=1e-4)
    assert max(norms) > 0.5  # something was clipped
    assert result["last_accuracy_ema"] == records[-1]["accuracy_ema"]
    assert f" (averaged {result['last_accuracy_ema']:.2f} %)" in caplog.text


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_batches_accumulated_are_the_batch_that_they_make(pair_config, tmp_path, method):
    for name, group in (("whole", 1), ("parts", 4)):
        keys = {"STUDENT.NAME": "resnet8_solver", "SOLVER.ACCUMULATE": group}
        cfg = pair_config(method, name, **keys, **{"SOLVER.BATCH_SIZE": 20 // group})
        run_experiment(cfg)
    models = [torch.load(tmp_path / name / "model_last.pth") for name in ("whole", "parts")]
    torch.testing.assert_close(*models, rtol=1e-6, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    ]
    for whole, parts in zip(*lines, strict=True):
        for key in whole.keys() - {"seconds", "images_per_second", "data_share"}:
            assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


def test_a_group_that_is_incomplete_is_left_out(tiny_config, monkeypatch):
    """Of four batches three make an update, and the rate is that of one update an epoch."""
    seen, rates = [], []
    set_schedule = Trainer.set_schedule

    def scheduled(self, step):
        set_schedule(self, step)
        seen.append(self.kind)
        rates.append(self._scheduled[0])

    monkeypatch.setattr(Trainer, "set_schedule", scheduled)
    keys = {"TEACHER.NAME": "", "SOLVER.ACCUMULATE": 3, "SOLVER.SCHEDULE": "cosine"}
    run_experiment(tiny_config(**keys, **{"SOLVER.WARMUP_EPOCHS": 0, "SOLVER.BASE_LR": 0.1}))
    assert seen == [(True, False), (False, False), (False, True)] * 2
    assert rates == pytest.approx([0.1] * 3 + [0.05] * 3)


def stop_in(epoch, monkeypatch):
    """End a run after the first step of an epoch, as a kill would."""
    step = Trainer.step

    def stopping(self, inputs, number):
        step(self, inputs, number)
        if self.epoch == epoch - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("method", ["kd", "pkd"])
def test_a_killed_run_goes_on_bit_for_bit(
    pair_config, tmp_path, monkeypatch, assert_same_run, method
):
    """In the middle of an update, with adapters that are trained as well."""
    keys = {**MODERN, "SOLVER.EPOCHS": 4, "STUDENT.NAME": "resnet8x4"}
    run_experiment(pair_config(method, "whole", **keys))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(3, patch)
        run_experiment(pair_config(method, "parts", **keys))
    (tmp_path / "parts" / "model_ema.pth").write_bytes(b"torn")  # put back, as the others are
    run_experiment(pair_config(method, "parts", **keys), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
