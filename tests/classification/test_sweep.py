"""Students side by side: each learns what it would learn alone, whatever becomes of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from classification.data import ResidentSet
from classification.lessons import _shared_observer
from classification.run import prepare_trainers, run_experiment
from classification.sweep import SideBySide, Sweep, run_side_by_side
from classification.trainer import Trainer
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics
from pcka.losses.mgd import random_mask

pytestmark = pytest.mark.usefixtures("without_plots")

# MGD draws masks from torch's generator, CRD remembers samples, VID trains variances.
METHODS = ("mgd", "crd", "kd", "vid", "rcka")
TOO_MUCH = {"DISTILL.KD.WEIGHT": 1e39}  # more than float32 holds


@pytest.fixture
def config(tiny_config, random_teacher):
    """``config(method, name, KEY=value)``: a tiny run with a teacher from a file."""

    def make(method, name, **keys):
        keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.CRD.NEGATIVES": 64, **keys}
        return tiny_config(method, name, **keys)

    return make


@pytest.fixture
def alone(config, tmp_path):
    """``alone(method)``: the folder of a run by itself."""

    def run(method, **keys):
        run_experiment(config(method, f"alone/{method}", **keys))
        return tmp_path / "alone" / method

    return run


def students_beside(folder):
    return [record["students"] for record in read_metrics(folder / "metrics.jsonl")]


def stop_before(epoch, monkeypatch):
    start_epoch = Trainer.start_epoch

    def stopping(self):
        if self.epoch == epoch - 1:
            raise KeyboardInterrupt
        start_epoch(self)

    monkeypatch.setattr(Trainer, "start_epoch", stopping)


def test_side_by_side_each_learns_what_it_learns_alone(config, alone, tmp_path, assert_same_run):
    cfgs = [config(method, f"together/{method}") for method in METHODS]
    results = run_side_by_side(cfgs)
    for method, result in zip(METHODS, results):
        own = tmp_path / "together" / method
        assert_same_run(own, alone(method))
        assert result["methods"][-1].casefold() == method
        assert result["last_accuracy"] == read_metrics(own / "metrics.jsonl")[-1]["accuracy"]
        assert students_beside(own) == [len(METHODS)] * 2


def test_side_by_side_each_has_its_own_optimizer_and_average(
    config, alone, tmp_path, assert_same_run
):
    keys = {
        "SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 0.002, "SOLVER.CLIP_GRADIENTS": 0.5,
        "SOLVER.EMA_DECAY": 0.9, "SOLVER.ACCUMULATE": 2, "SOLVER.SCHEDULE": "onecycle",
        "SOLVER.WARMUP_EPOCHS": 0,
    }  # fmt: skip
    methods = ("mgd", "kd")
    run_side_by_side([config(method, f"together/{method}", **keys) for method in methods])
    for method in methods:
        assert_same_run(tmp_path / "together" / method, alone(method, **keys))


def test_each_step_draws_anew(config, monkeypatch):
    drawn = []

    def recorded(x, ratio, over):
        mask = random_mask(x, ratio, over)
        if torch.is_grad_enabled():  # not the trial before the training
            drawn.append(mask)
        return mask

    monkeypatch.setattr("pcka.losses.mgd.random_mask", recorded)
    run_experiment(config("mgd", "mgd"))
    assert len({tuple(mask.flatten().tolist()) for mask in drawn}) == len(drawn) == 2 * 4


def test_one_that_is_behind_catches_up(config, alone, tmp_path, monkeypatch, assert_same_run):
    cfgs = [config(method, f"together/{method}") for method in ("mgd", "crd")]
    stop_before(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(cfgs[0])
    monkeypatch.undo()
    run_side_by_side(cfgs, resume=True)
    for method in ("mgd", "crd"):
        assert_same_run(tmp_path / "together" / method, alone(method))
        assert students_beside(tmp_path / "together" / method) == [1, 2]


def test_a_finished_run_among_them_is_not_touched(config, tmp_path, caplog):
    caplog.set_level("INFO", "pcka")
    first = config("kd", "kd")
    expected = run_experiment(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kd").rglob("*")}
    results = run_side_by_side([first, config("at", "at")], resume=True)
    assert results[0] == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kd").rglob("*")} == before
    assert students_beside(tmp_path / "at") == [1, 1]


def test_a_log_tells_of_its_own_run_alone(config, tmp_path, caplog):
    caplog.set_level("INFO", "pcka")
    run_side_by_side([config(method, method) for method in ("kd", "at")])
    for method, other in (("kd", "at"), ("at", "kd")):
        lines = (tmp_path / method / "log.txt").read_text().splitlines()
        assert sum("epoch 1/2" in line for line in lines) == 1
        assert sum("finished: " in line for line in lines) == 1
        assert any("teacher resnet8: accuracy" in line for line in lines)
        assert not any(f"loss_{other}" in line for line in lines)


@pytest.mark.parametrize("log_every", [1, 20])
def test_a_student_whose_loss_breaks_does_not_stop_the_others(
    config, alone, tmp_path, assert_same_run, log_every
):
    words = {"LOG_EVERY": log_every}
    cfgs = [config("kd", "broken", **words, **TOO_MUCH)]
    cfgs += [config(method, f"together/{method}", **words) for method in ("mgd", "crd")]
    failure, *results = run_side_by_side(cfgs)
    assert isinstance(failure, TrainingFailedError)
    expected = r"epoch 1 is not finite at step 1: loss_ce=\S+, loss_kd=inf, .*checkpoint: none yet"
    with pytest.raises(TrainingFailedError, match=expected):
        raise failure
    assert not (tmp_path / "broken" / "checkpoint.pth").exists()
    assert not (tmp_path / "broken" / "result.json").exists()
    assert [result["epochs"] for result in results] == [2, 2]
    for method in ("mgd", "crd"):
        assert_same_run(tmp_path / "together" / method, alone(method, **words))
        assert students_beside(tmp_path / "together" / method) == [2, 2]


def test_a_student_that_the_last_step_breaks_does_not_stop_the_others(
    config, alone, tmp_path, monkeypatch, assert_same_run
):
    cfgs = [config(method, f"together/{method}") for method in ("kd", "mgd")]
    step = SideBySide.step

    def breaking(self, inputs, number):
        step(self, inputs, number)
        kd = self.trainers[0]
        if kd.epoch == 1 and number == 3:
            kd.distiller.student.conv1.weight.data.fill_(float("nan"))

    monkeypatch.setattr(SideBySide, "step", breaking)
    failure, _ = run_side_by_side(cfgs)
    assert isinstance(failure, TrainingFailedError)
    assert "epoch 2 is not finite at the last step (student.conv1.weight)" in str(failure)
    assert "kd/checkpoint.pth (epoch 1)" in str(failure)
    monkeypatch.undo()
    assert_same_run(tmp_path / "together" / "mgd", alone("mgd"))
    # Nothing that cannot be gone on from was kept.
    run_experiment(cfgs[0], resume=True)
    assert_same_run(tmp_path / "together" / "kd", alone("kd"))


def test_when_all_fail_all_failures_are_given(config):
    cfgs = [config("kd", name, **TOO_MUCH) for name in ("a", "b")]
    assert [type(result) for result in run_side_by_side(cfgs)] == [TrainingFailedError] * 2
    with pytest.raises(TrainingFailedError, match="epoch 1 is not finite"):
        run_experiment(cfgs[0], resume=True)


def test_batches_are_made_and_the_teacher_runs_once_for_all(config, monkeypatch):
    made, taught = [], []
    training_batches = ResidentSet.training_batches

    def counted(self, cfg, epoch, *others):
        made.append(epoch)
        return training_batches(self, cfg, epoch, *others)

    def counted_observer(*arguments):
        observe = _shared_observer(*arguments)

        def record(images):
            outputs = observe(images)
            taught.append(set(outputs.features))
            return outputs

        return record

    monkeypatch.setattr(ResidentSet, "training_batches", counted)
    monkeypatch.setattr("classification.lessons._shared_observer", counted_observer)
    run_side_by_side([config(method, method) for method in ("ce", "kd", "fitnet", "rcka")])
    assert made == [0, 1]
    assert taught == [{"stage2", "last"}] * (2 * 4)  # what FitNet and RCKA read, in each step


def test_a_teacher_that_no_student_needs_does_not_run(config, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "classification.lessons._shared_observer", lambda *arguments: seen.append(arguments)
    )
    run_experiment(config("ce", "ce"))
    monkeypatch.undo()
    assert _shared_observer(*seen[0]) is None


def test_taps_of_one_name_and_two_places_are_refused(config, tmp_path):
    cfgs = [
        config(
            "fitnet", stage,
            **{"DISTILL.TAPS": f"[[mine, {stage}, {stage}]]", "DISTILL.FITNET.STAGES": "[mine]"},
        )
        for stage in ("layer1", "layer2")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"DISTILL\.TAPS: .*'mine' .*layer1.*layer2"):
        run_side_by_side(cfgs)
    run_side_by_side([cfgs[0]], resume=True)


def test_runs_that_differ_in_more_than_their_method_are_refused(config):
    cfgs = [config("kd", "a"), config("kd", "b", **{"SOLVER.GAMMA": 0.5})]
    expected = r"SOLVER\.GAMMA: runs side by side may differ in .* 0\.1 and 0\.5"
    with pytest.raises(ConfigError, match=expected):
        run_side_by_side(cfgs)


@pytest.fixture
def timed_run(tiny_config, tmp_path, monkeypatch):
    """A clock by which a batch takes 1 s to make, the first step 10 s and any other one 3 s."""
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0)
    training_batches, step = ResidentSet.training_batches, Trainer.step

    def slow_batches(self, *arguments):
        for batch in training_batches(self, *arguments):
            now[0] += 1
            yield batch

    def slow_step(self, inputs, number):
        step(self, inputs, number)
        now[0] += 3 if number else 10

    monkeypatch.setattr("pcka.engine.progress.time", clock)
    monkeypatch.setattr(ResidentSet, "training_batches", slow_batches)
    monkeypatch.setattr(Trainer, "step", slow_step)

    def run(**keys):
        run_experiment(tiny_config(**{"TEACHER.NAME": "", "SOLVER.EPOCHS": 1, **keys}))
        (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
        return record

    return run


def test_the_rate_leaves_out_the_first_step_and_the_share_of_data_counts_all(timed_run):
    record = timed_run()  # four steps of ten images
    assert record["seconds"] == 4 * 1 + 10 + 3 * 3
    assert record["images_per_second"] == pytest.approx(3 * 10 / (3 * (1 + 3)))
    assert record["data_share"] == pytest.approx(4 / 23)
    assert record["students"] == 1


def test_an_epoch_of_one_step_has_its_rate(timed_run):
    record = timed_run(**{"SOLVER.BATCH_SIZE": 40})
    assert record["images_per_second"] == pytest.approx(40 / 11)
    assert record["data_share"] == pytest.approx(1 / 11)


def test_the_line_of_an_epoch_tells_what_it_took_in_all(timed_run, monkeypatch, caplog):
    caplog.set_level("INFO", "pcka")
    seconds = iter([0.0, 4.0])  # before and after the evaluation
    monkeypatch.setattr(
        "classification.trainer.time", SimpleNamespace(perf_counter=lambda: next(seconds))
    )
    timed_run()
    assert " 27.0 s (23.0 s of training, " in caplog.text


def test_a_step_that_breaks_off_leaves_the_random_state_outside_as_it_was(tiny_config):
    (trainer,) = prepare_trainers([tiny_config()], torch.device("cpu"))
    sweep = Sweep()
    sweep.add(trainer)
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt), sweep.random_state_of(trainer):
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.rand(()) == expected
