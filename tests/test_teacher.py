from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pcka import Distiller, losses
from pcka.teacher import Ensemble, FrozenTeacher, fold_batch_norms

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())


def test_stays_in_eval_mode(model):
    teacher = FrozenTeacher(model)
    outer = nn.ModuleList([teacher]).train()
    assert outer.training
    assert not any(module.training for module in teacher.modules())


def test_nothing_of_it_changes_or_learns(model):
    teacher = FrozenTeacher(model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = teacher(IMAGES), teacher(IMAGES.clone().requires_grad_())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not first.requires_grad and not second.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_gives_what_the_model_gives(model):
    expected = model.eval()(IMAGES)
    torch.testing.assert_close(FrozenTeacher(model)(IMAGES), expected)


def test_channels_last_reaches_weights_and_images(model):
    expected = model.eval()(IMAGES)
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher = FrozenTeacher(model, channels_last=True)
    torch.testing.assert_close(teacher(IMAGES), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_put_into_training_mode_behind_its_back_goes_to_eval_mode_again(model):
    teacher = FrozenTeacher(model)
    expected, before = teacher(IMAGES), model[1].running_mean.clone()
    model.train()
    torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=0)
    assert torch.equal(model[1].running_mean, before)
    assert not any(module.training for module in model.modules())
    model[1].train()  # a part of it alone
    torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=0)
    assert torch.equal(model[1].running_mean, before)


@pytest.fixture
def two_models():
    torch.manual_seed(3)
    return [nn.Sequential(nn.Flatten(), nn.Linear(12, 5)) for _ in range(2)]


def test_an_ensemble_gives_the_weighted_mean_of_logits(two_models):
    images = torch.randn(4, 3, 2, 2)
    first, second = (model(images) for model in two_models)
    assert_close(Ensemble(two_models)(images), (first + second) / 2)
    assert_close(Ensemble(two_models, [3, 1])(images), 0.75 * first + 0.25 * second)
    for temperature in (1.0, 4.0):
        means = [(z / temperature).softmax(1) for z in (first, second)]
        geometric = means[0] ** 0.75 * means[1] ** 0.25
        softened = (Ensemble(two_models, [3, 1])(images) / temperature).softmax(1)
        assert_close(softened, geometric / geometric.sum(1, keepdim=True))


def test_each_member_has_its_own_input_and_logits_that_are_found(two_models):
    class Named(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return {"scores": self.model(images)}

    images = torch.randn(4, 3, 2, 2)
    ensemble = Ensemble(
        [Named(model) for model in two_models],
        inputs=[nn.Identity(), nn.Hardtanh()],
        logits_of="scores",
    )
    expected = (two_models[0](images) + two_models[1](images.clamp(-1, 1))) / 2
    assert_close(ensemble(images), expected)


def test_a_distiller_reads_taps_of_any_member_of_an_ensemble(two_models):
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    distiller = Distiller(
        student,
        Ensemble(two_models),
        [losses.build("KD"), losses.build("PKT", stages=["a", "b"])],
        {"a": ("1", "members.0.1"), "b": ("1", "members.1.1")},
    )
    images = torch.randn(4, 3, 2, 2)
    seen = distiller.observe_teacher(images)
    assert_close(seen.features["b"], two_models[1](images))
    assert_close(seen.logits, (seen.features["a"] + seen.features["b"]) / 2)
    assert distiller(images, torch.arange(4)).keys() == {"loss_kd", "loss_pkt_a", "loss_pkt_b"}


def test_the_batch_norms_of_all_members_are_folded():
    def model():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    torch.manual_seed(0)
    ensemble, images = Ensemble([model(), model()]), torch.randn(4, 3, 8, 8)
    ensemble(images)  # statistics of their own
    expected = ensemble.eval()(images)
    folded = fold_batch_norms(ensemble, ["members.1.3"])
    assert folded == ["members.0.1", "members.0.4", "members.1.1"]
    assert_close(ensemble(images), expected)


@pytest.mark.parametrize(
    ("members", "keywords", "match"),
    [
        (0, {}, "members: expected one or more models, got none"),
        (2, {"shares": [1.0]}, r"shares: expected 2 numbers above 0, one per member, got \[1.0\]"),
        (2, {"shares": [1.0, 0.0]}, "shares: expected 2 numbers above 0"),
        (2, {"inputs": [nn.Identity()]}, "inputs: expected 2 modules, one per member, got 1"),
    ],
)
def test_an_ensemble_refuses_what_does_not_fit(two_models, members, keywords, match):
    with pytest.raises(ValueError, match=match):
        Ensemble(two_models[:members], **keywords)


def test_members_of_other_classes_are_refused(two_models):
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    match = r"expected logits \(4, 5\) from member 1 \(Sequential\), got \(4, 6\); .* same classes"
    with pytest.raises(ValueError, match=match):
        Ensemble([two_models[0], other])(torch.randn(4, 3, 2, 2))
