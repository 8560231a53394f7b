"""Feature maps of two widths and sizes, on their way through the distiller to every loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pcka import Distiller, losses
from pcka.losses import Context, Outputs

BATCH, CLASSES, SIDE = 4, 5, 32
STAGES = ("stage1", "stage2", "stage3")
IMAGES = torch.linspace(-2, 3, BATCH * 3 * SIDE * SIDE).sin().view(BATCH, 3, SIDE, SIDE)
TARGET = torch.arange(BATCH)

# What a model may return; its logits are found by themselves.
ANSWERS: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"loss": None, "logits": x},
    "tuple": lambda x: (x, None),
    "object": lambda x: SimpleNamespace(loss=None, logits=x),
}
SETTINGS = {"PCKA": {"patch_sizes": 2}, "PATCHED": {"patch_sizes": 2}, "CRD": {"negatives": 8}}
OF_FEATURES = [
    name
    for name in losses.names()
    if {"stages", "stage"} & {*losses.defaults(name)} and not losses.build(name).of_detectors
]
# Losses that compare maps of the same shape, and how they do it.
OF_ONE_SHAPE = {
    "CWD": losses.cwd_loss,
    "FITNET": losses.fitnet_loss,
    "PATCHED": partial(losses.patched_loss, patch_size=2),
    "PCKA": partial(losses.pcka_loss, patch_size=2),
    "PKD": losses.pkd_loss,
}


class Net(nn.Sequential):
    """Three stages, each of half the side of the one before; module paths are the taps' names."""

    def __init__(self, width: int, stride: int, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(width)
        for stage, channels in enumerate((3, width, width), start=1):
            step = stride if stage == 1 else 2
            conv = nn.Conv2d(channels, width, 3, step, padding=1)
            self.add_module(f"stage{stage}_preact", conv)
            self.add_module(f"stage{stage}", nn.ReLU())
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("pooled", nn.Flatten())
        self.add_module("head", nn.Linear(width, CLASSES))
        self.answer = answer

    def forward(self, images: Tensor) -> object:
        return self.answer(super().forward(images))


def through(answer: str, name: str, stages: tuple[str, ...] | None = None) -> Distiller:
    """A prepared distiller: widths 4 and 6, the teacher's maps of half the student's sides."""
    student, teacher = Net(4, 1, ANSWERS[answer]), Net(6, 2, ANSWERS[answer])
    settings = {**SETTINGS.get(name, {}), **({"stages": stages} if stages else {})}
    taps = {path: path for path, _ in teacher.named_children()} | {"last": "stage3"}
    distiller = Distiller(student, teacher, [losses.build(name, **settings)], taps)
    norm = torch.linspace(0.5, 1.5, 6), torch.linspace(-0.5, 0.5, 6)
    context = Context(
        train_labels=torch.arange(20) % CLASSES,
        teacher_classifier=teacher.head,
        teacher_norms={f"{stage}_preact": norm for stage in STAGES},
    )
    torch.manual_seed(0)
    distiller.prepare(IMAGES, context=context)
    return distiller


@pytest.mark.parametrize("name", OF_FEATURES)
def test_every_loss_of_features_takes_two_widths_and_sizes_from_any_model(name):
    found = {}
    for answer in ANSWERS:
        distiller = through(answer, name)
        torch.manual_seed(1)
        terms = distiller(IMAGES, TARGET, indices=torch.arange(BATCH))
        assert all(term.isfinite() and term != 0 for term in terms.values())
        sum(terms.values()).backward()
        assert distiller.student.stage1_preact.weight.grad.norm() > 0
        assert all(p.grad is not None for p in distiller.adapters.parameters())
        found[answer] = {term: value.detach() for term, value in terms.items()}
    for answer in ANSWERS:
        torch.testing.assert_close(found[answer], found["tensor"], rtol=0, atol=0)


def test_these_are_the_losses_that_compare_maps_of_one_shape():
    built = {name: losses.build(name) for name in losses.names()}
    matching = {n for n, loss in built.items() if loss.same_shape and not loss.of_detectors}
    matching |= {"FITNET"} if losses.FitNet(regressor=False).same_shape else set()
    assert matching == OF_ONE_SHAPE.keys()


def of_one_shape(name: str, **settings: object) -> losses.Loss:
    extra = {"regressor": False} if name == "FITNET" else SETTINGS.get(name, {})
    return losses.build(name, weights=1.0, **extra, **settings)


def distiller_of(*chosen: losses.Loss, tap: str = "last") -> Distiller:
    """Unprepared; the models' own maps do not count."""
    student, teacher = (Net(width, 1, ANSWERS["tensor"]) for width in (4, 6))
    return Distiller(student, teacher, chosen, {tap: "stage3"})


def maps(*dtype: torch.dtype, shapes=((3, 8, 6), (5, 4, 6)), tap: str = "last") -> list[Outputs]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    return [Outputs(features={tap: x.to(*dtype)}) for x in drawn]


@pytest.mark.parametrize("name", OF_ONE_SHAPE)
def test_the_width_is_adapted_by_a_convolution_and_the_larger_map_pooled(name):
    pair = maps(torch.float64)
    distiller = distiller_of(of_one_shape(name))
    distiller.prepare_for(*pair)
    weight, bias = distiller.adapters.state_dict().values()
    assert list(distiller.adapters.state_dict()) == ["last.weight", "last.bias"]
    assert weight.shape == (5, 3, 1, 1)
    student, teacher = (outputs.feature("last") for outputs in pair)
    adapted = torch.einsum("bchw,dc->bdhw", student, weight[:, :, 0, 0]) + bias[:, None, None]
    expected = OF_ONE_SHAPE[name](adapted.unflatten(2, (4, 2)).mean(3), teacher)
    (term,) = distiller.terms(*pair, None).values()
    torch.testing.assert_close(term.value, expected)
    assert "adapters.last.weight" in distiller.state_dict()


@pytest.mark.parametrize("name", OF_ONE_SHAPE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_in_float32_goes_with_maps_of_any_dtype(name, dtype):
    pair = maps(dtype, shapes=((3, 8, 6), (5, 8, 6)))
    distiller = distiller_of(of_one_shape(name))
    distiller.prepare_for(*pair)
    (term,) = distiller.terms(*pair, None).values()
    assert term.value.dtype == torch.float32
    term.value.backward()
    gradients = [parameter.grad for parameter in distiller.adapters.parameters()]
    assert [grad.dtype for grad in gradients] == [torch.float32] * 2
    assert all(grad.isfinite().all() for grad in gradients)


@pytest.mark.parametrize("name", OF_ONE_SHAPE)
def test_maps_of_one_shape_have_no_adapter_and_stay_as_they_are(name, monkeypatch):
    seen = []
    loss = of_one_shape(name)
    monkeypatch.setattr(loss, "terms", lambda *given: seen.extend(given) or {"loss_x": (1, None)})
    pair = maps(torch.bfloat16, shapes=((3, 8, 6), (3, 8, 6)))
    distiller = distiller_of(loss)
    distiller.prepare_for(*pair)
    distiller.terms(*pair, None)
    assert not distiller.adapters
    assert all(given.feature("last") is own.feature("last") for given, own in zip(seen, pair))


def test_losses_of_one_tap_share_its_adapter():
    pair = maps()
    chosen = [of_one_shape("CWD"), losses.FitNet(stages=["last"], weights=1.0), of_one_shape("PKD")]
    chosen[1].regressors["last"] = nn.Conv2d(3, 5, (5, 1))
    chosen[1].prepare = lambda *_: None
    distiller = distiller_of(*chosen)
    distiller.prepare_for(*pair)
    assert list(distiller.adapters) == ["last"]
    terms = distiller.terms(*pair, None)
    (adapter,) = distiller.adapters.values()
    gradients = {
        name: torch.autograd.grad(term.value, adapter.weight, retain_graph=True, allow_unused=True)
        for name, term in terms.items()
    }
    assert gradients["loss_fitnet_last"] == (None,)  # it has a regressor of its own
    assert gradients["loss_cwd_last"][0].norm() > 0 < gradients["loss_pkd_last"][0].norm()


def test_without_preparation_two_widths_are_refused_with_the_way_out():
    message = r"PKD compares feature maps of the same shape.*Distiller\.prepare"
    with pytest.raises(ValueError, match=message):
        distiller_of(of_one_shape("PKD")).terms(*maps(), None)


@pytest.mark.parametrize("name", OF_ONE_SHAPE)
def test_features_that_are_no_maps_are_refused_by_the_dry_run(name):
    with pytest.raises(ValueError, match="before the pooling"):
        distiller_of(of_one_shape(name)).prepare_for(*maps(shapes=((3,), (5,))))


def test_a_tap_may_be_called_as_the_module_that_it_reads():
    pair = maps(tap="layer4.2")
    distiller = distiller_of(of_one_shape("PKD", stages=["layer4.2"]), tap="layer4.2")
    distiller.prepare_for(*pair)
    assert list(distiller.adapters) == ["layer4/2"]
    assert list(distiller.terms(*pair, None)) == ["loss_pkd_layer4.2"]


@pytest.mark.parametrize("loss", ["PKD", "FITNET"])
def test_a_tap_may_be_called_by_a_word_that_module_dictionaries_keep_for_themselves(loss):
    names = ("pop", "training", "a.b")
    taps = dict(zip(names, STAGES, strict=True))
    distiller = Distiller(
        Net(4, 1, ANSWERS["tensor"]),
        Net(6, 2, ANSWERS["tensor"]),
        [losses.build(loss, stages=names)],
        taps,
    )
    distiller.prepare(IMAGES)
    assert list(distiller(IMAGES, TARGET)) == [f"loss_{loss.lower()}_{name}" for name in names]
    assert all(
        name.startswith(("student.", "losses.", "adapters.")) for name in distiller.state_dict()
    )


def test_the_teachers_outputs_are_needed_to_size_adapters():
    with pytest.raises(ValueError, match="teacher: a loss compares its maps, got None"):
        distiller_of(of_one_shape("PKD")).prepare_for(maps()[0], None)


class Detector(nn.Module):
    """Answers with its own losses; its backbone with a pyramid."""

    class Backbone(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, padding=1)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            p3 = self.conv(images)
            return {"p3": p3, "p4": nn.functional.avg_pool2d(p3, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.Backbone(4)

    def forward(self, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        levels = self.backbone(torch.stack([entry["image"] for entry in batch]))
        return {"loss_box": levels["p4"].square().mean()}


class Pyramid(Detector.Backbone):
    """A teacher that takes a list of images and their common size."""

    def forward(self, images: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return super().forward(torch.stack(images)[:, :, : size[0], : size[1]])


def test_a_detector_learns_from_a_pyramid_by_outputs_that_its_trainer_has():
    torch.manual_seed(0)
    student, teacher = Detector(), Pyramid(6)
    taps = {level: (f"backbone:{level}", f":{level}") for level in ("p3", "p4", "p9")}
    loss = losses.PCKA(stages=["p3", "p4"], patch_sizes=4, weights=2.0)
    distiller = Distiller(student, teacher, [loss], taps, gather=False)
    images = list(IMAGES)

    def observe() -> tuple[Outputs, Outputs | None]:
        own = distiller.observe_student([{"image": image} for image in images])
        return own, distiller.observe_teacher(images, (SIDE, SIDE))

    distiller.prepare_for(*observe())
    assert list(distiller.adapters) == ["p3", "p4"]
    student_outputs, teacher_outputs = observe()
    terms = distiller.terms(student_outputs, teacher_outputs, None)
    assert list(terms) == ["loss_pcka_p3_rows", "loss_pcka_p4_rows"]
    total = student_outputs.raw["loss_box"] + sum(term.weighted for term in terms.values())
    total.backward()
    assert all(p.grad.norm() > 0 for p in student.parameters() if p.dim() == 4)
