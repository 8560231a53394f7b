from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from classification.models import create_model
from classification.preflight import tried_inputs
from classification.run import prepare_trainers, run_experiment
from pcka.engine.config import ConfigError
from pcka.engine.preflight import check_teaching, naming, untrained_parameters
from pcka.taps import FeatureTap
from pcka.teacher import FrozenTeacher


def test_a_teacher_that_gives_the_same_for_all_images_is_refused_by_the_tap(tiny_config, tmp_path):
    model = create_model("resnet8", 10)
    torch.nn.init.zeros_(model.layer2[0].bn2.weight)
    torch.nn.init.zeros_(model.layer2[0].downsample[1].weight)  # all is constant from here on
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    keys = {"TEACHER.WEIGHTS": tmp_path / "teacher.pth"}
    for method, tap in (("kd", "logits"), ("fitnet", r"stage2 \(layer2\)"), ("rcka", "last")):
        with pytest.raises(
            ConfigError, match=rf"TEACHER: values of {tap}.* are the same for every imag"
        ):
            run_experiment(tiny_config(method, **keys))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    stage1 = {"DISTILL.FITNET.STAGES": "[stage1]", "SOLVER.EPOCHS": 1}
    run_experiment(tiny_config("fitnet", **keys, **stage1))  # before that it is not


def test_a_teacher_whose_features_overflow_is_refused(tiny_config, tmp_path):
    model = create_model("resnet8", 10)
    torch.nn.init.constant_(model.layer3[0].bn2.weight, 1e38)
    torch.nn.init.constant_(model.layer3[0].bn2.running_var, 1e-12)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(
        ConfigError, match=r"TEACHER: values of last .* are not finite; check TEACHER.W"
    ):
        run_experiment(tiny_config("rcka", **{"TEACHER.WEIGHTS": tmp_path / "teacher.pth"}))


def test_images_that_are_all_the_same_say_nothing_of_the_teacher():
    teacher = FrozenTeacher(create_model("resnet8", 10))
    check_teaching(teacher, {"last": "layer3"}, torch.ones(4, 3, 16, 16), logits=True)


def test_what_a_loss_refuses_of_the_models_names_the_section(tiny_config, random_teacher):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.AT.STAGES": "[pooled]"}
    with pytest.raises(ConfigError, match=r"^DISTILL: "):
        run_experiment(tiny_config("at", **keys))
    with pytest.raises(ConfigError, match=r"^DISTILL.TAPS: student: .* no module 'layr1'"):
        run_experiment(tiny_config("at", **keys, **{"DISTILL.TAPS": "[[pooled, layr1, layer1]]"}))


def test_a_batch_too_small_for_a_loss_is_refused(tiny_config, random_teacher):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.METHODS": "[CE, FCKA]"}
    keys |= {"DISTILL.FCKA.UNBIASED": True, "SOLVER.BATCH_SIZE": 3}
    told = "FCKA compares at least 4 images at a time, but SOLVER.BATCH_SIZE gives it 3"
    with pytest.raises(ConfigError, match=rf"^DISTILL.METHODS: {told}"):
        run_experiment(tiny_config("kd", **keys))


def test_a_path_that_no_loss_reads_is_refused_as_well(tiny_config, random_teacher):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.TAPS": "[[mine, layer1, layr2]]"}
    with pytest.raises(ConfigError, match=r"^DISTILL.TAPS: teacher: .* no module 'layr2'"):
        run_experiment(tiny_config("kd", **keys))


def test_a_tap_that_cannot_be_read_ends_in_one_line():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(2, 2), relu)
    with (
        pytest.raises(ConfigError, match=r"^DISTILL: tap 'mid': module '0' ran twice"),
        naming("DISTILL"),
        FeatureTap(model, {"mid": "0"}),
    ):
        model(torch.ones(1, 2))


def test_trying_the_losses_changes_neither_models_nor_losses_nor_random_numbers(
    tiny_config, random_teacher, monkeypatch
):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.METHODS": "[CE, CRD, MGD, VID]"}
    cfg = tiny_config(**keys, **{"DISTILL.CRD.NEGATIVES": 8})

    def prepared():
        (trainer,) = prepare_trainers([cfg], torch.device("cpu"))
        return trainer.distiller.state_dict(), torch.get_rng_state()

    tried = prepared()
    monkeypatch.setattr("classification.preflight.try_losses", lambda *_, **__: None)
    torch.testing.assert_close(prepared(), tried, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("methods", "found"),
    [
        ("[CE]", []),
        ("[CE, CRD, MGD, VID]", []),  # the losses' own parameters get one, too
        ("[FITNET]", ["student.fc.weight", "student.fc.bias"]),
    ],
)
def test_parameters_without_a_gradient_are_found_and_nothing_changes(
    tiny_config, random_teacher, methods, found
):
    keys = {"TEACHER.WEIGHTS": random_teacher, "DISTILL.METHODS": methods}
    cfg = tiny_config(**keys, **{"DISTILL.CRD.NEGATIVES": 8})
    (trainer,) = prepare_trainers([cfg], torch.device("cpu"))
    before = copy.deepcopy(trainer.distiller.state_dict()), torch.get_rng_state()
    given = tried_inputs(cfg, trainer.train_set)
    assert untrained_parameters(trainer.distiller, **given) == found
    after = trainer.distiller.state_dict(), torch.get_rng_state()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in trainer.distiller.parameters())


def test_parameters_without_a_gradient_are_found_without_compiling(tiny_config):
    cfg = tiny_config("ce", **{"TEACHER.NAME": "", "COMPILE": True})
    (trainer,) = prepare_trainers([cfg], torch.device("cpu"))
    counters.clear()
    assert untrained_parameters(trainer.distiller, **tried_inputs(cfg, trainer.train_set)) == []
    assert not counters["frames"]


def test_a_loss_that_gives_no_term_is_refused(tiny_config, random_teacher, monkeypatch):
    monkeypatch.setattr("pcka.losses.kd.KD.terms", lambda *_: {})
    with pytest.raises(ConfigError, match=r"DISTILL: losses: KD gives no term; check its settings"):
        run_experiment(tiny_config("kd", **{"TEACHER.WEIGHTS": random_teacher}))
