from __future__ import annotations

import pytest
import torch

from classification.run import run_experiment
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import RunFolder, read_metrics


@pytest.mark.parametrize("method", ["add_metrics", "save_last", "save_state"])
def test_a_run_that_stops_while_it_writes_an_epoch_loses_that_one_only(
    tiny_config, tmp_path, monkeypatch, assert_same_run, method
):
    run_experiment(tiny_config("ce", "straight", **{"TEACHER.NAME": ""}))
    written = getattr(RunFolder, method)
    calls = 0

    def stop_in_epoch_2(self, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        written(self, *arguments, **keywords)

    monkeypatch.setattr(RunFolder, method, stop_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tiny_config("ce", "stopped", **{"TEACHER.NAME": ""}))
    saved = torch.load(tmp_path / "stopped" / "checkpoint.pth", weights_only=True)
    assert saved["epoch"] == 1
    monkeypatch.undo()
    run_experiment(tiny_config("ce", "stopped", **{"TEACHER.NAME": ""}), resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_a_best_student_that_a_kill_left_unwritten_is_written_at_the_resume(
    tiny_config, tmp_path, monkeypatch, assert_same_run
):
    def stop(self, student):
        raise KeyboardInterrupt

    keys = {"TEACHER.NAME": "", "SOLVER.EPOCHS": 1}
    run_experiment(tiny_config("ce", "straight", **keys))
    monkeypatch.setattr(RunFolder, "save_best", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tiny_config("ce", "stopped", **keys))
    assert not (tmp_path / "stopped" / "model_best.pth").exists()
    monkeypatch.undo()
    run_experiment(tiny_config("ce", "stopped", **keys), resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_a_longer_run_is_not_taken_for_a_shorter_one(tiny_config, tmp_path):
    keys = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "multistep"}
    run_experiment(tiny_config("ce", **keys, **{"SOLVER.EPOCHS": 2}))
    with pytest.raises(ConfigError, match=r"SOLVER.EPOCHS: .* already has 2 epochs, 1 are"):
        run_experiment(tiny_config("ce", **keys, **{"SOLVER.EPOCHS": 1}), resume=True)
    assert (tmp_path / "run" / "result.json").exists()
    assert (
        run_experiment(tiny_config("ce", **keys, **{"SOLVER.EPOCHS": 3}), resume=True)["epochs"]
        == 3
    )


@pytest.mark.parametrize("role", ["TEACHER", "STUDENT"])
def test_weights_that_are_not_there_are_named_before_any_work(tiny_config, tmp_path, role):
    cfg = tiny_config("kd", **{f"{role}.WEIGHTS": tmp_path / "typo.pth", "DATA.ROOT": "nowhere"})
    with pytest.raises(ConfigError, match=rf"{role}.WEIGHTS: there is no file '.*typo.pth'"):
        run_experiment(cfg)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_teacher_is_trained_to_its_end(tiny_config, tmp_path, monkeypatch):
    keys = {"TEACHER.EPOCHS": 2}
    run_experiment(tiny_config("kd", "straight", **keys, **cache(tmp_path, "a")))
    add_metrics = RunFolder.add_metrics

    def stop_in_epoch_2(self, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt
        add_metrics(self, record)

    monkeypatch.setattr(RunFolder, "add_metrics", stop_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tiny_config("kd", "stopped", **keys, **cache(tmp_path, "b")))
    assert not list((tmp_path / "b").glob("*.pth"))
    monkeypatch.undo()
    run_experiment(tiny_config("kd", "stopped", **keys, **cache(tmp_path, "b")), resume=True)
    ours, theirs = (next((tmp_path / name).glob("*.pth")) for name in "ab")
    torch.testing.assert_close(torch.load(ours), torch.load(theirs), rtol=0, atol=0)


def cache(tmp_path, name):
    return {"TEACHER.CACHE_DIR": tmp_path / name}


def test_a_continuation_on_other_images_is_refused(tiny_config, monkeypatch):
    keys = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "multistep"}
    run_experiment(tiny_config(**keys))
    monkeypatch.setattr("classification.data.digits.HIGHEST_VALUE", 20)
    with pytest.raises(ConfigError, match="the images are not those the run was started"):
        run_experiment(tiny_config(**keys, **{"SOLVER.EPOCHS": 3}), resume=True)


@pytest.mark.parametrize(
    ("schedule", "milestones", "named"),
    [
        ("multistep", "[1, 2, 7]", "at 2, 7, beyond SOLVER.EPOCHS 2"),
        ("multistep", "[1]", None),
        ("cosine", "[7]", None),
    ],
)
def test_milestones_that_no_epoch_reaches_are_told_at_the_start(
    tiny_config, caplog, schedule, milestones, named
):
    keys = {"SOLVER.SCHEDULE": schedule, "SOLVER.MILESTONES": milestones, "TEACHER.NAME": ""}
    run_experiment(tiny_config(**keys))
    told = [text for text in caplog.messages if "SOLVER.MILESTONES" in text]
    assert len(told) == (named is not None)
    assert all(named in text for text in told)


def test_doubts_are_told_at_the_start_of_a_run(tiny_config, random_teacher, caplog):
    run_experiment(tiny_config("rcka", **{"TEACHER.WEIGHTS": random_teacher}))
    (told,) = [text for text in caplog.messages if "meant for trainings like the paper's" in text]
    assert "in 8 a student" in told  # two epochs of four batches


@pytest.mark.parametrize(("images", "followed"), [(3, False), (4, True)])
def test_too_few_evaluation_images_leave_the_alignment_out_and_are_told(
    tiny_config, random_teacher, tmp_path, caplog, images, followed
):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DATA.HOLDOUT": images}
    assert run_experiment(tiny_config("kd", **keys))["epochs"] == 2
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert ("cka_stage1" in record) == followed
    told = [text for text in caplog.messages if "is not tracked: it needs at least 4" in text]
    assert len(told) == (not followed)


def test_a_finished_cosine_is_prolonged_as_its_refusal_says(tiny_config, tmp_path):
    keys = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "cosine", "SOLVER.EPOCHS": 1}
    run_experiment(tiny_config("ce", **keys))
    with pytest.raises(ConfigError, match=r"other values of SOLVER\.EPOCHS; ") as refused:
        run_experiment(tiny_config("ce", **{**keys, "SOLVER.EPOCHS": 3}), resume=True)
    words = str(refused.value).partition("without --resume, ")[2].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["SOLVER.EPOCHS"] == "2" and given["SOLVER.BASE_LR"] == "0.005"
    result = run_experiment(tiny_config("ce", **{**keys, **given}))
    assert result["epochs"] == 2
    assert (tmp_path / "run-further" / "result.json").exists()


def test_a_shorter_cosine_is_told_of_no_prolonging(tiny_config):
    keys = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "cosine", "SOLVER.EPOCHS": 2}
    run_experiment(tiny_config("ce", **keys))
    with pytest.raises(ConfigError) as refused:
        run_experiment(tiny_config("ce", **{**keys, "SOLVER.EPOCHS": 1}), resume=True)
    assert "train on" not in str(refused.value)


def test_a_student_starts_with_the_weights_that_it_inherits(
    tiny_config, tmp_path, random_teacher, assert_same_run
):
    inherits = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.INHERIT": "['fc.']", "SEED": 1}
    still = {"SOLVER.BASE_LR": 0.0, "SOLVER.EPOCHS": 1, "SOLVER.SCHEDULE": "multistep"}
    cfg = tiny_config("kd", "still", **inherits, **still)
    run_experiment(cfg)
    learned = torch.load(tmp_path / "still" / "model_last.pth", weights_only=True)
    teacher = torch.load(random_teacher, weights_only=True)
    assert torch.equal(learned["fc.weight"], teacher["fc.weight"])
    assert not torch.equal(learned["conv1.weight"], teacher["conv1.weight"])
    # A run that goes on keeps what it has learned of them.
    keys = {**inherits, "SOLVER.SCHEDULE": "multistep"}
    run_experiment(tiny_config("kd", "straight", **keys, **{"SOLVER.EPOCHS": 2}))
    run_experiment(tiny_config("kd", "resumed", **keys, **{"SOLVER.EPOCHS": 1}))
    run_experiment(tiny_config("kd", "resumed", **keys, **{"SOLVER.EPOCHS": 2}), resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"DISTILL.INHERIT": "['head.']"}, r"under 'head.' no weight of the teacher has the"),
        ({"DISTILL.INHERIT": "['fc.']", "TEACHER.NAME": ""}, r"there is no teacher to inherit"),
        (
            {"DISTILL.INHERIT": "['conv1.']", "TEACHER.PIXEL_MEAN": [0.5, 0.5, 0.5]},
            r"conv1.weight reads images, and PIXEL_MEAN of student and teacher differ",
        ),
    ],
)
def test_what_cannot_be_inherited_is_refused(tiny_config, random_teacher, keys, message):
    method = "ce" if "TEACHER.NAME" in keys else "kd"
    keys = {"TEACHER.WEIGHTS": random_teacher, **keys}
    with pytest.raises(ConfigError, match=rf"DISTILL.INHERIT: {message}"):
        run_experiment(tiny_config(method, **keys))
