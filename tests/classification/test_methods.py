"""Every method file: it trains, goes on where it stopped, and goes with every configuration."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext

import pytest
import torch

from classification.config import CONFIGS, load_config, method_files
from classification.models import create_model
from classification.models.taps import loss_context, model_taps
from classification.run import check_losses, losses_of, run_experiment
from classification.sweep import run_side_by_side
from classification.trainer import Trainer
from pcka.distiller import Distiller
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics
from pcka.files import load_file
from pcka.teacher import FrozenTeacher

pytestmark = pytest.mark.usefixtures("without_plots")

DIGITS = CONFIGS / "digits" / "resnet20_resnet8.yaml"
METHODS = sorted(method_files(DIGITS))
RUNS = sorted(
    path
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "methods" and path.stem != "base"
)
PAIRS = [path for path in RUNS if path.parent.name == "cifar100"]
SETTINGS = {
    "DEVICE": "cpu",
    "AUTOCAST": "",
    "DATA.IMAGE_SIZE": 16,
    "DATA.TRAIN_IMAGES": 60,
    "DATA.HOLDOUT": 20,
    "SOLVER.EPOCHS": 2,
    "REPORT": False,
    "SOLVER.BATCH_SIZE": 20,
    "DISTILL.CRD.NEGATIVES": 64,
}

# Losses with a state of their own; KDSVD only where the models' widths differ.
ADAPTED = (
    "CC", "CRD", "CTKD", "FITNET", "ICKD", "ITRD", "MGD", "OFD", "REVIEWKD", "SRRL", "VID", "VKD"
)  # fmt: skip

# Losses of several terms that are none of stages.
PARTS = {"ITRD": ("correlation", "mutual"), "MLKD": ("instance", "batch", "class")}

WILDCARDS = {
    "all": ["stage1", "stage2", "stage3"],
    "all_preact": ["stage1_preact", "stage2_preact", "stage3_preact"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def configure(folder):
    """``configure(method, name, KEY=value)``: that method's run in ``folder / name / method``."""

    def make(method: str, name: str, **keys: object):
        keys = {"TEACHER.WEIGHTS": folder / "teacher" / "ce" / "model_last.pth", **keys}
        keys = {**SETTINGS, "OUTPUT_DIR": folder / name / method, **keys}
        return load_config(DIGITS, [str(word) for pair in keys.items() for word in pair], method)

    student_alone = {"TEACHER.NAME": "", "STUDENT.NAME": "resnet20", "SOLVER.EPOCHS": 1}
    run_experiment(make("ce", "teacher", **student_alone))
    return make


@pytest.fixture(scope="module")
def whole(folder, configure):
    """The folder of all methods' runs over two epochs."""
    results = run_side_by_side([configure(method, "whole") for method in METHODS])
    assert not any(isinstance(result, TrainingFailedError) for result in results), results
    return folder / "whole"


@pytest.fixture(scope="module")
def stopped(folder, configure):
    """Method -> the checkpoint of a run that stopped after its first epoch."""
    start_epoch = Trainer.start_epoch

    def stopping(self):
        if self.epoch == 1:
            raise KeyboardInterrupt
        start_epoch(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "start_epoch", stopping)
        run_side_by_side([configure(method, "stopped") for method in METHODS])
    return {method: load_file(folder / "stopped" / method / "checkpoint.pth") for method in METHODS}


@pytest.fixture(scope="module")
def in_bfloat16(folder, configure):
    """Method -> the result of one epoch under autocast."""
    keys = {"AUTOCAST": "bfloat16", "SOLVER.EPOCHS": 1}
    keys |= {"DATA.TRAIN_IMAGES": 40}  # bfloat16 is slow where it is emulated
    cfgs = [configure(method, "bfloat16", **keys) for method in METHODS]
    return dict(zip(METHODS, run_side_by_side(cfgs)))


def expected_terms(method: str) -> set[str]:
    """By the names of the losses and their stages alone."""
    distill = load_config(DIGITS, method=method).DISTILL
    return {f"loss_{term}" for name in distill.METHODS for term in _terms(name, distill[name])}


def _terms(name: str, section) -> list[str]:
    given = section.get("STAGES", [])
    stages = [stage for word in given for stage in WILDCARDS.get(word, [word])]
    if name in ("RCKA", "LCKA"):
        return [*(f"fcka_{stage}" for stage in stages), "lcka_intra", "lcka_inter"]
    if name in PARTS:
        return [f"{name.lower()}_{part}" for part in PARTS[name]]
    if name == "KDSVD" or not stages:
        return [name.lower()]
    if name == "REVIEWKD":
        stages.append("pooled")
    return [f"{name.lower()}_{stage}" for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_terms_are_in_the_metrics_and_add_up(method, whole):
    first, last = read_metrics(whole / method / "metrics.jsonl")
    for record in (first, last):
        terms = {key: value for key, value in record.items() if key.startswith("loss_")}
        total = terms.pop("loss_total")
        assert terms.keys() == expected_terms(method)
        assert all(math.isfinite(value) and value != 0 for value in terms.values())
        assert total == pytest.approx(sum(terms.values()), rel=1e-5)
        assert {f"cka_stage{i}" for i in range(4)} < record.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_trained_and_saved_apart_from_the_student(method, configure, whole, stopped):
    state = load_file(whole / method / "checkpoint.pth")
    names = configure(method, "whole").DISTILL.METHODS
    assert bool(state["losses"]) == any(name in ADAPTED for name in names)
    student = create_model("resnet8", 10)
    for file in ("model_last.pth", "model_best.pth"):
        assert load_file(whole / method / file).keys() == student.state_dict().keys()
    trained = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert (trained > len(list(student.parameters()))) == bool(state["losses"])
    changed = [
        name for name, value in state["losses"].items()
        if not torch.equal(value, stopped[method]["losses"][name])
    ]  # fmt: skip
    assert bool(changed) == bool(state["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(
    method, folder, configure, whole, stopped, assert_same_run
):
    assert stopped[method]["epoch"] == 1
    run_experiment(configure(method, "stopped"), resume=True)
    assert_same_run(folder / "stopped" / method, whole / method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_in_bfloat16_stays_finite(method, folder, in_bfloat16):
    assert not isinstance(in_bfloat16[method], TrainingFailedError), in_bfloat16[method]
    (record,) = read_metrics(folder / "bfloat16" / method / "metrics.jsonl")
    assert expected_terms(method) < record.keys()
    assert all(math.isfinite(value) for value in record.values())
    state = load_file(folder / "bfloat16" / method / "checkpoint.pth")
    parts = {**state["student"], **state["losses"]}
    assert all(value.isfinite().all() for value in parts.values())


@pytest.fixture(scope="module")
def models_made_once():
    """Checks read no more of a model than its paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("classification.models.weights.create_model", functools.cache(create_model))
        yield


@pytest.mark.parametrize("run", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_method_goes_with_every_configuration(run, models_made_once):
    """Or is refused: images are mixed and AdamW steps where transformers and their like learn."""
    refused = {"crd": "cannot learn from mixed images", "kd_dot": "requires plain SGD"}
    for method in method_files(run):
        of_today = run.parent.name == "cifar100_folder" and method in refused
        with pytest.raises(ConfigError, match=refused[method]) if of_today else nullcontext():
            check_losses(load_config(run, method=method))


def network(name):
    torch.manual_seed(0)
    return create_model(name, 100)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda path: path.stem)
def test_adapters_fit_every_pair_of_cifar100(pair):
    cfg = load_config(pair)
    student, teacher = network(cfg.STUDENT.NAME), network(cfg.TEACHER.NAME)
    taps = model_taps(student, teacher, [])
    modules = {path: teacher.get_submodule(path) for path in teacher.preactivation_norms if path}
    norms = {path: (norm.weight.detach(), norm.bias.detach()) for path, norm in modules.items()}
    frozen = FrozenTeacher(teacher, fold_batch_norm=True)
    labels = torch.arange(20) % 10
    context = loss_context(teacher, norms, taps, labels)
    images, indices = torch.rand(4, 3, 32, 32), torch.tensor([3, 14, 8, 0])
    outputs = {}
    for name in (*ADAPTED, "KDSVD"):
        cfg = load_config(pair, ["DISTILL.CRD.NEGATIVES", "8"], name.lower())
        distiller = Distiller(student, frozen, losses_of(cfg, taps), taps)
        distiller.prepare(images, context=context)
        terms = distiller(images, labels[indices], indices=indices)
        outputs |= terms
        student.zero_grad()
        sum(terms.values()).backward()
        for part in (student, distiller.losses):
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients), name
            assert gradients or part is not student
    assert all(term.isfinite() and term != 0 for term in outputs.values()), outputs
    assert len(outputs) > len(ADAPTED)
