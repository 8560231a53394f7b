from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from classification.compare import measure_costs
from classification.trainer import Trainer
from pcka.engine.cost import Cost

SECONDS = {"KD": [100, 100, 2, 9, 2], "CE": [100, 100, 1, 1, 9]}  # two rounds are for warming up


@pytest.fixture
def cfgs(tiny_config, random_teacher):
    """Configurations of three methods by name."""

    def make(*methods):
        keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.CRD.NEGATIVES": 64}
        return {method: tiny_config(method, method, **keys) for method in methods}

    return make


@pytest.fixture
def steps(monkeypatch):
    """The order of the steps, which take :data:`SECONDS` by the clock and 3 MiB."""
    now, order, timed_step = [0.0], [], Trainer.step

    def timed(self, inputs, step):
        timed_step(self, inputs, step)
        name = self.cfg.DISTILL.METHODS[-1]
        now[0] += SECONDS[name][order.count(name)]
        order.append(name)

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr("pcka.engine.cost.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("pcka.engine.cost.peak_growth", lambda call, device: 3 * 2**20)
    return order


def test_costs_are_medians_for_an_image_of_steps_that_take_turns(cfgs, steps, tmp_path):
    costs = measure_costs(cfgs("kd", "ce"), tmp_path / "new" / "costs.json", rounds=3)
    assert costs == {"kd": Cost(1000 * 2 / 10, 3.0), "ce": Cost(1000 * 1 / 10, 3.0)}
    assert steps == ["KD", "CE"] * 5
    kept = json.loads((tmp_path / "new" / "costs.json").read_text())
    assert kept["kd"]["cost"] == {"milliseconds": 200, "mebibytes": 3}
    # Runs leave no trace of it.
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_a_step_that_is_measured_is_an_update(tiny_config, tmp_path, monkeypatch):
    kinds, original = [], Trainer.step

    def recorded(self, inputs, step):
        original(self, inputs, step)
        kinds.append(self.kind)

    monkeypatch.setattr(Trainer, "step", recorded)
    keys = {"TEACHER.NAME": "", "SOLVER.ACCUMULATE": 2}
    measure_costs({"ce": tiny_config(**keys)}, tmp_path / "costs.json", rounds=1)
    assert {*kinds} == {(True, True)}


def test_kept_costs_are_read_and_measured_anew_with_a_new_method(cfgs, steps, tmp_path):
    path = tmp_path / "costs.json"
    costs = measure_costs(cfgs("kd"), path, rounds=3)
    done = len(steps)
    assert measure_costs(cfgs("kd"), path) == costs
    assert len(steps) == done
    steps.clear()
    assert list(measure_costs(cfgs("kd", "ce"), path, rounds=3)) == ["kd", "ce"]
    assert len(steps) == 10


def test_kept_costs_of_other_settings_do_not_count(cfgs, steps, tmp_path):
    path = tmp_path / "costs.json"
    costs = measure_costs(cfgs("kd"), path, rounds=3)
    changed = cfgs("kd")["kd"]
    changed.defrost()
    changed.OUTPUT_DIR = "elsewhere"
    assert measure_costs({"kd": changed}, path) == costs
    steps.clear()
    changed.SOLVER.BATCH_SIZE = 5
    assert measure_costs({"kd": changed}, path, rounds=3)["kd"].milliseconds == 1000 * 2 / 5


def test_steps_go_on_over_the_epochs_and_remember(cfgs, tmp_path):
    """Four batches an epoch, and a loss whose memory wants the images' places in the set."""
    costs = measure_costs(cfgs("ce", "crd"), tmp_path / "costs.json", rounds=5)
    assert all(cost.milliseconds > 0 and cost.mebibytes >= 0 for cost in costs.values())


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_costs_are_measured_anew(cfgs, steps, tmp_path, content):
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert measure_costs(cfgs("kd"), path, rounds=3)["kd"].milliseconds == 200
    assert "kd" in json.loads(path.read_text())
