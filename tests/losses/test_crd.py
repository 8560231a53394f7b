"""CRD against its equations written in NumPy, and what its memories, draws and state promise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import Context, Outputs, crd_loss

SAMPLES, WIDTH_S, WIDTH_T = 30, 5, 7
LABELS = torch.arange(SAMPLES) % 3
SETTINGS = {"dim": 6, "negatives": 11, "temperature": 0.3, "momentum": 0.7, "weight": 2.0}
BATCHES = (torch.tensor([3, 11, 22, 8]), torch.tensor([8, 2, 3, 29]))


def _pair(draw, seed, indices, dtype=torch.float64):
    student = Outputs(
        features={"pooled": draw(seed, len(indices), WIDTH_S).to(dtype)}, indices=indices
    )
    teacher = Outputs(features={"pooled": draw(seed + 1, len(indices), WIDTH_T).to(dtype)})
    return student, teacher


def _prepared(draw, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    loss = losses.build("CRD", **(SETTINGS | changes))
    loss.prepare(*_pair(draw, 90, BATCHES[0], dtype), Context(train_labels=LABELS))
    return loss


def _state(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def _noise_contrast(scores, z, samples):
    """The public formula, anchor by anchor: a positive first, then the negatives."""
    total = 0.0
    noise = (scores.shape[1] - 1) / samples
    for row in np.exp(scores) / z:
        total -= np.log(row[0] / (row[0] + noise + 1e-7))
        total -= sum(np.log(noise / (p + noise + 1e-7)) for p in row[1:])
    return total / len(scores)


class _Reference:
    """CRD in NumPy, from the weights and memories of a prepared loss."""

    def __init__(self, loss):
        state = {name: value.numpy() for name, value in _state(loss).items()}
        self.memory = {m: state[f"{m}_view.memory"] for m in ("student", "teacher")}
        self.weight = {m: state[f"{m}_view.embedding.weight"] for m in self.memory}
        self.bias = {m: state[f"{m}_view.embedding.bias"] for m in self.memory}
        self.z = {}

    def step(self, student, teacher, negatives):
        indices = student.indices.numpy()
        anchors = {}
        for model, outputs in (("student", student), ("teacher", teacher)):
            v = outputs.features["pooled"].numpy() @ self.weight[model].T + self.bias[model]
            anchors[model] = v / np.sqrt((v**2).sum(1, keepdims=True))
        total = 0.0
        for model, other in (("student", "teacher"), ("teacher", "student")):
            scores = np.array(
                [
                    [anchors[model][i] @ self.memory[other][n] for n in (own, *negatives[i])]
                    for i, own in enumerate(indices)
                ]
            )
            scores = scores / SETTINGS["temperature"]
            z = self.z.setdefault(model, np.exp(scores).mean() * SAMPLES)
            total += _noise_contrast(scores, z, SAMPLES)
        m = SETTINGS["momentum"]
        for model, v in anchors.items():
            for i, own in enumerate(indices):
                row = m * self.memory[model][own] + (1 - m) * v[i]
                self.memory[model][own] = row / np.linalg.norm(row)
        return SETTINGS["weight"] * total


def test_two_steps_are_the_published_equations(draw, monkeypatch):
    loss = _prepared(draw)
    reference = _Reference(loss)
    picks = np.random.RandomState(3).randint(SAMPLES, size=(2, 4, SETTINGS["negatives"]))
    for step, indices in enumerate(BATCHES):
        monkeypatch.setattr(loss.others, "draw", lambda *_, s=step: torch.from_numpy(picks[s]))
        student, teacher = _pair(draw, 10 * step, indices)
        terms = loss(student, teacher, None)
        assert terms.keys() == {"loss_crd"}
        expected = reference.step(student, teacher, picks[step])
        assert terms["loss_crd"].item() == pytest.approx(expected, rel=1e-9)
        for model, memory in reference.memory.items():
            np.testing.assert_allclose(loss.state_dict()[f"{model}_view.memory"], memory, rtol=1e-9)


def test_crd_loss_is_the_published_formula(draw):
    scores = draw(0, 3, 6)
    expected = _noise_contrast(scores.numpy(), 12.0, 40)
    assert crd_loss(scores, 12.0, 40).item() == pytest.approx(expected, rel=1e-9)


def test_many_small_negatives_are_not_lost_to_rounding(draw):
    scores = draw(0, 2, 16385, scale=1.3)
    exact = crd_loss(scores, 1e5, 50000)
    assert crd_loss(scores.float(), 1e5, 50000).item() == pytest.approx(exact.item(), rel=1e-5)


def test_gradient_goes_through_both_embeddings_to_the_student_alone(draw):
    loss = _prepared(draw)
    student, teacher = _pair(draw, 0, BATCHES[0])
    loss(student, teacher, None)  # sets the normalizers, which would follow the features below
    loss.eval()
    x, y = student.features["pooled"].requires_grad_(), teacher.features["pooled"].requires_grad_()
    loss(student, teacher, None)["loss_crd"].backward()
    assert y.grad is None
    assert loss.student_view.embedding.weight.grad.norm() > 0
    assert loss.teacher_view.embedding.weight.grad.norm() > 0

    def at(change):
        moved = Outputs(features={"pooled": x.detach() + change}, indices=student.indices)
        return loss(moved, teacher, None)["loss_crd"].item()

    direction = draw(5, *x.shape)
    slope = (at(1e-6 * direction) - at(-1e-6 * direction)) / 2e-6
    assert (x.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_the_backward_pass_works_after_the_memories_have_moved(draw):
    training, evaluating = _prepared(draw), _prepared(draw).eval()
    evaluating.draws = 1  # the first draw of training
    gradients = []
    for loss in (training, evaluating):
        student, teacher = _pair(draw, 0, BATCHES[0])
        x = student.features["pooled"].requires_grad_()
        loss(student, teacher, None)["loss_crd"].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_negatives_are_all_samples_of_other_classes_alike(draw):
    loss = _prepared(draw, negatives=20000)
    indices = torch.tensor([0, 4, 29])
    negatives = loss._draw(indices)
    for own, drawn in zip(LABELS[indices], negatives):
        counts = drawn.bincount(minlength=SAMPLES)
        assert (counts[own == LABELS] == 0).all()
        assert (counts[own != LABELS] - 1000).abs().max() < 160  # five standard deviations


def test_unequal_classes_in_any_order_are_skipped_whole():
    labels = torch.tensor([4, 0, 4, 4, 2, 0, 4])  # class 1 and 3 have no samples
    others = losses.crd._OtherClasses(labels)
    drawn = others.draw(torch.arange(7), 200, torch.Generator().manual_seed(0))
    for own, row in zip(labels, drawn):
        assert row.unique().tolist() == (labels != own).nonzero().flatten().tolist()


def test_draws_differ_by_step_and_seed_and_leave_torchs_generator_alone(draw):
    losses_ = [_prepared(draw, seed=seed) for seed in (0, 0, 1)]
    before = torch.get_rng_state()
    first, again, other = (loss._draw(BATCHES[0]) for loss in losses_)
    second = losses_[0]._draw(BATCHES[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_initial_memory_is_uniform_and_its_own_for_each_model(draw):
    loss = _prepared(draw, dim=128)
    bound = (3 / 128) ** 0.5
    student, teacher = loss.student_view.memory, loss.teacher_view.memory
    assert 0.99 * bound < student.abs().max() <= bound
    assert student.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(student, teacher)


def test_a_resumed_run_is_the_same_bit_for_bit(draw):
    whole = _prepared(draw, torch.float32)
    whole(*_pair(draw, 0, BATCHES[0], torch.float32), None)
    resumed = _prepared(draw, torch.float32)
    resumed.load_state_dict(_state(whole))
    values = [loss(*_pair(draw, 5, BATCHES[1], torch.float32), None) for loss in (whole, resumed)]
    assert torch.equal(values[0]["loss_crd"], values[1]["loss_crd"])
    ends = _state(whole), _state(resumed)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_state_is_what_training_changes(draw):
    assert {name.split(".")[-1] for name in _prepared(draw).state_dict()} == {
        *("weight", "bias", "memory", "normalizer", "_extra_state")
    }


def test_evaluation_changes_nothing(draw):
    loss = _prepared(draw).eval()
    before = _state(loss)
    loss(*_pair(draw, 0, BATCHES[0]), None)
    assert all(torch.equal(value, before[name]) for name, value in _state(loss).items())


def test_the_first_batch_sets_the_normalizer_for_good(draw):
    loss = _prepared(draw)
    loss(*_pair(draw, 0, BATCHES[0]), None)
    normalizer = loss.student_view.normalizer.clone()
    loss(*_pair(draw, 5, BATCHES[1]), None)
    assert normalizer > 0
    assert torch.equal(loss.student_view.normalizer, normalizer)


def test_a_sample_that_comes_twice_is_remembered_as_it_came_first(draw):
    once, twice = _prepared(draw), _prepared(draw)
    indices = torch.tensor([3, 11, 3, 11])
    student, teacher = _pair(draw, 0, indices)
    twice(student, teacher, None)
    first = slice(0, 2)
    once(
        Outputs(features={"pooled": student.features["pooled"][first]}, indices=indices[first]),
        Outputs(features={"pooled": teacher.features["pooled"][first]}),
        None,
    )
    torch.testing.assert_close(once.student_view.memory, twice.student_view.memory)


def test_maps_are_averaged_over_their_positions(draw):
    maps = draw(0, 4, WIDTH_S, 2, 3)
    loss = _prepared(draw).eval()
    student, teacher = _pair(draw, 0, BATCHES[0])
    values = [
        loss(Outputs(features={"pooled": x}, indices=student.indices), teacher, None)["loss_crd"]
        for x in (maps, maps.mean((2, 3)))
    ]
    torch.testing.assert_close(*values)


def test_autocast_does_not_round_the_scores(draw):
    loss = _prepared(draw, torch.float32)
    student, teacher = _pair(draw, 0, BATCHES[0], torch.float32)
    expected = copy.deepcopy(loss)(student, teacher, None)["loss_crd"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, None)["loss_crd"]
    assert torch.equal(value, expected)


def test_bfloat16_features_meet_float32_embeddings(draw):
    loss = _prepared(draw, torch.bfloat16)
    assert loss.student_view.memory.dtype == torch.float32
    value = loss(*_pair(draw, 0, BATCHES[0], torch.bfloat16), None)["loss_crd"]
    assert value.dtype == torch.float32
    assert value.isfinite()


def test_an_unprepared_loss_says_so(draw):
    with pytest.raises(RuntimeError, match=r"CRD is not prepared.*Distiller\.prepare"):
        losses.build("CRD")(*_pair(draw, 0, BATCHES[0]), None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, r"context\.train_labels: CRD needs it"), (torch.ones(9).long(), "all 9 labels are")],
)
def test_labels_of_several_classes_are_needed(draw, labels, message):
    with pytest.raises(ValueError, match=message):
        losses.build("CRD").prepare(*_pair(draw, 0, BATCHES[0]), Context(train_labels=labels))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, r"student\.indices: CRD needs it"),
        (torch.arange(3), r"each of the 4 samples .* got \(3,\)"),
        (torch.arange(4.0), r"\(B,\) int64; got \(4,\) torch\.float32"),
    ],
)
def test_each_sample_needs_its_index(draw, indices, message):
    student, teacher = _pair(draw, 0, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        _prepared(draw)(Outputs(features=student.features, indices=indices), teacher, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dim", 0), ("negatives", 0), ("seed", -1), ("momentum", 1.0), ("temperature", 0.0)],
)
def test_senseless_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        losses.build("CRD", **{setting: value})


def test_scores_need_a_negative():
    with pytest.raises(ValueError, match=r"at least one negative for each anchor; got \(4, 1\)"):
        crd_loss(torch.zeros(4, 1), 1.0, 10)
