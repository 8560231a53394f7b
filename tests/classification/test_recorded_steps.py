"""Steps that a CUDA graph can hold, shown without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from classification.config import load_config, method_files
from classification.data import Batch, ResidentSet
from classification.data.augmentation import erase
from classification.data.mixing import Mixture, mix
from classification.models import create_model
from classification.models.taps import loss_context, model_taps
from classification.run import losses_of, run_experiment
from classification.sweep import run_side_by_side
from classification.trainer import Trainer
from pcka.distiller import Distiller
from pcka.engine import cuda_graph
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import read_metrics
from pcka.teacher import FrozenTeacher

PAIR = "configs/classification/cifar100/resnet56_resnet20.yaml"
CUDA = torch.device("cuda", 0)
ALL_TAPS = {name: ("layer1", "layer1") for name in ("stage1", "stage2", "stage3", "last", "pooled")}
NOT_CAPTURABLE = {"crd", "kdsvd", "vkd"}


FUSED = (torch.ops.aten._fused_sgd_.tensor_lr, torch.ops.aten._fused_adamw_.tensor_lr)
# What else a step may do, beside a loss.
MODERN = {
    "SOLVER.OPTIMIZER": "adamw", "SOLVER.BASE_LR": 0.002, "SOLVER.CLIP_GRADIENTS": 0.5,
    "SOLVER.EMA_DECAY": 0.9, "SOLVER.DECAY_NORMS_AND_BIASES": False,
}  # fmt: skip


class HostCopies(TorchDispatchMode):
    """Names the operators that move values between the device and the host."""

    def __init__(self):
        super().__init__()
        self.across = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Of the device alone by their signature: the rate is a tensor. They have no fake.
        if function in FUSED:
            assert kwargs["lr"].device == CUDA
            return None
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        # A number that Python made is a scalar of the host in every other operator.
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        devices = {x.device.type for x in tensors if x.dim() or copies}
        if len(devices) > 1:
            self.across.append(str(function))
        return result


@pytest.fixture
def values_are_unknown(monkeypatch):
    """Tensors have shapes and devices alone: whoever asks for a value or for a shape by it fails.

    Modules stay where they are made, as such tensors cannot be swapped.
    """
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    with FakeTensorMode():
        yield


def cifar_trainer(method, device, keys):
    """The trainer of a CIFAR-100 run, without its files."""
    words = [str(word) for pair in keys.items() for word in pair]
    cfg = load_config(PAIR, ["AUTOCAST", "bfloat16", *words], method)
    student, model = (create_model(name, 100) for name in ("resnet20", "resnet56"))
    norms = (model.get_submodule(path) for path in model.preactivation_norms)
    norms = {p: (n.weight, n.bias) for p, n in zip(model.preactivation_norms, norms)}
    taps = model_taps(student, model, [])
    distiller = Distiller(student, FrozenTeacher(model), losses_of(cfg, taps), taps)
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.int64)
    data = ResidentSet(images, labels, tuple(map(str, range(100))))
    distiller.prepare(images[:2].float(), context=loss_context(model, norms, taps, labels))
    return Trainer(cfg, distiller, {}, data, data, None)


def step_inputs(trainer):
    images, labels = torch.zeros(64, 3, 32, 32), trainer.train_set.labels
    trainer.obstacle = ""  # nothing is to be recorded here
    return next(trainer.inputs([Batch(images, labels, labels)]))


METHODS = sorted(method_files().keys() - NOT_CAPTURABLE)


@pytest.mark.parametrize(
    ("method", "keys"), [*((method, {}) for method in METHODS), ("kd_fcka", MODERN)]
)
def test_a_step_on_a_gpu_asks_for_no_value_and_copies_nothing(
    method, keys, values_are_unknown, monkeypatch
):
    """All but the backward pass, which needs the device's driver; see the next test."""
    with CUDA:
        trainer = cifar_trainer(method, CUDA, keys)
        assert all(loss.capturable for loss in trainer.distiller.losses)
        inputs = step_inputs(trainer)
        trainer.changed_tensors()  # makes the momentum, as before a recording

        def backward(total):
            for parameter in trainer.distiller.parameters():
                parameter.grad = torch.empty_like(parameter)

        def grad(total, parameters, **_):
            return [torch.empty_like(parameter) for parameter in parameters]

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(torch.autograd, "grad", grad)
        with HostCopies() as seen:
            terms = trainer.update(inputs)
    assert terms.device == CUDA and len(terms) == len(trainer._terms) >= 2
    assert seen.across == []


@pytest.mark.parametrize("method", ["ce", "dkd", "nkd"])
def test_soft_targets_ask_for_no_value(method, values_are_unknown, monkeypatch):
    with CUDA:
        trainer = cifar_trainer(method, CUDA, {})
        inputs = replace(step_inputs(trainer), labels=torch.rand(64, 100))
        trainer.changed_tensors()
        monkeypatch.setattr(torch.Tensor, "backward", lambda _: None)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        with HostCopies() as seen:
            trainer.update(inputs)
    assert seen.across == []


def test_batches_are_erased_and_mixed_without_a_value(values_are_unknown):
    """What is drawn comes from the host before; the images stay where they are."""
    with CUDA, HostCopies() as seen:
        labels = torch.zeros(64, dtype=torch.int64)
        images = erase(torch.zeros(64, 3, 32, 32), labels[:, None].expand(-1, 4), torch.rand(64, 3))
        batch = Batch(images, labels, labels)
        for mixture in (Mixture(0.3), Mixture(0.75, (2, 18, 0, 16))):
            mixed = mix(batch, mixture, 100)
            assert mixed.images.device == CUDA and mixed.labels.shape == (64, 100)
    assert seen.across == []


@pytest.mark.parametrize("method", METHODS)
def test_the_backward_pass_asks_for_no_value(method, values_are_unknown, monkeypatch):
    trainer = cifar_trainer(method, torch.device("cpu"), {})
    inputs = step_inputs(trainer)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # on a CPU it reads the rate
    trainer.update(inputs)
    assert all(p.grad is not None for p in trainer.distiller.student.parameters())


def test_a_loss_that_cannot_be_recorded_says_so(tiny_config):
    with FakeTensorMode():
        for method in NOT_CAPTURABLE:
            cfg = load_config(PAIR, [], method)
            unfit = [loss for loss in losses_of(cfg, ALL_TAPS) if not loss.capturable]
            assert [type(loss).__name__.lower() for loss in unfit] == [method]


class Recorder(TorchDispatchMode):
    """Keeps every operator with the very tensors that it was called with and gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        read = {memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        # A view needs no work of its own: it shows what is in the memory that it looks at.
        fresh = [memory(x) not in read for x in outputs]
        if function._schema.is_mutable or any(fresh):
            self.calls.append((function, args, kwargs or {}, outputs, fresh))
        return given


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class ReplayedOnTheCpu:
    """What a graph does, without one: operators run again, in the same memory, without Python."""

    made = 0

    def __init__(self, function, inputs, changed, beside=None):
        type(self).made += 1
        self.draws, changed = False, list(changed)
        with torch.no_grad():
            self.inputs = cuda_graph.map_tensors(torch.clone, inputs)
            kept = [tensor.clone() for tensor in changed]
        with Recorder() as recorder:
            self.outputs = function(self.inputs)
        self.calls = recorder.calls
        with torch.no_grad():
            for tensor, value in zip(changed, kept, strict=True):
                tensor.copy_(value)

    def __call__(self, inputs):
        pairs = zip(cuda_graph.tensors_of(self.inputs), cuda_graph.tensors_of(inputs), strict=True)
        with torch.no_grad():
            for static, fresh in pairs:
                static.copy_(fresh)
            for function, args, kwargs, outputs, fresh in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                again = [x for x in again if isinstance(x, torch.Tensor)]
                for old, new, is_fresh in zip(outputs, again, fresh, strict=True):
                    if is_fresh and old.numel():
                        old.detach().copy_(new)
        return self.outputs


class NoStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded and replayed, on the CPU."""
    monkeypatch.setattr(ReplayedOnTheCpu, "made", 0)
    monkeypatch.setattr(cuda_graph, "CapturedFunction", ReplayedOnTheCpu)
    monkeypatch.setattr("classification.trainer._obstacle", lambda _: None)
    monkeypatch.setattr("torch.cuda.Stream", NoStream)
    monkeypatch.setattr("torch.cuda.current_stream", NoStream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: nullcontext())
    return ReplayedOnTheCpu


@pytest.mark.parametrize(
    ("more", "steps"), [({}, 1), (MODERN, 1), ({**MODERN, "SOLVER.ACCUMULATE": 5}, 3)]
)
def test_recorded_steps_train_as_plain_ones_do(pair_config, tmp_path, request, more, steps):
    """Ten steps an epoch: the teacher sees eight batches at once, and then two.

    Where batches make an update together, the first, the last and any other are steps of a kind.
    """
    runs = {"kd": 0, "fcka": 0, "ce": 1, "ctkd": 0, **({} if more else {"kd_dot": 0})}
    keys = {"SOLVER.BATCH_SIZE": 4, "SOLVER.SCHEDULE": "cosine", **more}
    for method, seed in runs.items():
        run_experiment(pair_config(method, f"plain/{method}", SEED=seed, **keys))
    recorded = request.getfixturevalue("recorded")
    cfgs = [pair_config(m, f"recorded/{m}", SEED=seed, **keys) for m, seed in runs.items()]
    run_side_by_side(cfgs)
    assert recorded.made == steps + 1  # the step of all students, and the teacher
    for method in runs:
        assert_close_run(tmp_path / "recorded" / method, tmp_path / "plain" / method)


def assert_close_run(ours, theirs):
    """The teacher sees several batches at once, which rounds otherwise."""
    models = [path.name for path in theirs.glob("model_[le]*.pth")]
    for name in (*models, "checkpoint.pth"):
        mine, other = (torch.load(folder / name, weights_only=True) for folder in (ours, theirs))
        if name == "checkpoint.pth":
            mine, other = (part["optimizer"]["state"] for part in (mine, other))
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (ours, theirs))):
        shared = [key for key in a if key.startswith(("loss_", "lr", "acc", "gradient"))]
        assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, rel=1e-4)


def test_a_student_that_fails_does_not_stop_those_recorded_beside_it(
    pair_config, recorded, tmp_path
):
    broken = {"DISTILL.KD.WEIGHT": 1e38, "DISTILL.WARMUP": 0}
    failure, result = run_side_by_side([pair_config("kd", "a", **broken), pair_config("ce", "b")])
    assert "epoch 1 is not finite" in str(failure)
    assert result["epochs"] == 2


@pytest.mark.parametrize("more", [{}, MODERN, {**MODERN, "SOLVER.ACCUMULATE": 2}])
def test_recorded_runs_go_on_after_a_kill(pair_config, recorded, tmp_path, assert_same_run, more):
    """What a recording does to weights, moments and average is undone."""

    def config(name, epochs):
        keys = {"SOLVER.EPOCHS": epochs, "SOLVER.SCHEDULE": "multistep", "DISTILL.WARMUP": 0}
        return pair_config("kd", name, **keys, **more)

    run_experiment(config("whole", 3))
    run_experiment(config("parts", 1))
    run_experiment(config("parts", 3), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_recorded_steps_learn_from_a_teachers_outputs_on_disk_the_same_bits(
    pair_config, recorded, tmp_path, assert_same_run
):
    """Ten steps an epoch, as above; students of one of two seeds ask the teacher."""

    def train(name, outputs):
        recorded.made = 0
        keys = {"SOLVER.BATCH_SIZE": 4, "TEACHER.OUTPUTS": outputs}
        runs = {"kd": 0, "fcka": 0, "ce": 1}
        run_side_by_side(
            [pair_config(m, f"{name}/{m}", SEED=seed, **keys) for m, seed in runs.items()]
        )
        return recorded.made

    assert train("live", "") == 2  # the step of all students, and the teacher
    assert train("kept", tmp_path / "outputs") == 2
    assert train("disk", tmp_path / "outputs") == 1
    for method in ("kd", "fcka", "ce"):
        assert_same_run(tmp_path / "kept" / method, tmp_path / "live" / method)
        assert_same_run(tmp_path / "disk" / method, tmp_path / "live" / method)


def test_epochs_between_evaluations_and_checkpoints_are_trained_all_the_same(
    tiny_config, tmp_path, assert_same_run
):
    every = {"TEACHER.NAME": "", "SOLVER.EPOCHS": 5, "SOLVER.SCHEDULE": "multistep"}
    run_experiment(tiny_config(name="always", **every))
    rare = tiny_config(name="rare", EVAL_EVERY=2, SAVE_EVERY=3, **every)
    result = run_experiment(rare)
    always, seldom = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("always", "rare"))
    assert ["accuracy" in record for record in seldom] == [False, True, False, True, True]
    evaluated = [record["accuracy"] for record in seldom if "accuracy" in record]
    assert evaluated == [always[epoch]["accuracy"] for epoch in (1, 3, 4)]
    assert result["best_accuracy"] == max(evaluated) and result["last_accuracy"] == evaluated[-1]
    models = [torch.load(tmp_path / n / "model_last.pth") for n in ("always", "rare")]
    torch.testing.assert_close(*models, rtol=0, atol=0)
    state = torch.load(tmp_path / "rare" / "checkpoint.pth", weights_only=True)
    assert state["epoch"] == 5


def test_a_run_killed_between_checkpoints_goes_on_to_the_same_end(
    tiny_config, tmp_path, monkeypatch
):
    keys = {"TEACHER.NAME": "", "SOLVER.EPOCHS": 5, "SAVE_EVERY": 10, "EVAL_EVERY": 5}
    result = run_experiment(tiny_config(name="whole", **keys))
    finish, done = Trainer.finish_epoch, []

    def killed(self, figures):
        done.append(self.epoch)
        if len(done) == 4:
            raise KeyboardInterrupt
        finish(self, figures)

    monkeypatch.setattr(Trainer, "finish_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(tiny_config(name="parts", **keys))
    again = run_experiment(tiny_config(name="parts", **keys), resume=True)
    assert done == [0, 1, 2, 3, 1, 2, 3, 4]  # goes on after the first, whose checkpoint there is
    assert again["last_accuracy"] == result["last_accuracy"]
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [r["loss_total"] for r in records[0]] == [r["loss_total"] for r in records[1]]


def test_a_failure_names_the_checkpoint_that_is_there(pair_config, monkeypatch):
    keys = {"TEACHER.NAME": "", "SOLVER.EPOCHS": 5, "SAVE_EVERY": 10, "EVAL_EVERY": 5}
    step = Trainer.step

    def breaking(self, inputs, number):
        step(self, inputs, number)
        if self.epoch == 3:
            self.distiller.student.conv1.weight.data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "step", breaking)
    with pytest.raises(TrainingFailedError, match=r"epoch 4 .*checkpoint\.pth \(epoch 1\)"):
        run_experiment(pair_config("ce", "run", **keys))


def test_a_run_does_not_end_on_an_epoch_that_was_not_evaluated(tiny_config):
    def config(epochs):
        keys = {"TEACHER.NAME": "", "SOLVER.SCHEDULE": "multistep", "EVAL_EVERY": 2}
        return tiny_config(**{**keys, "SOLVER.EPOCHS": epochs})

    run_experiment(config(4))
    with pytest.raises(ConfigError, match=r"SOLVER\.EPOCHS"):
        run_experiment(config(3), resume=True)
