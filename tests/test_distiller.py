from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pcka.distiller import Distiller
from pcka.losses import CE, FCKA, KD, RCKA, FitNet, Loss, Outputs, Term, build, fcka_loss, kd_loss
from pcka.teacher import FrozenTeacher

IMAGES = torch.linspace(-2, 3, 6 * 3 * 8 * 8).sin().view(6, 3, 8, 8)
TARGET = torch.tensor([0, 1, 2, 3, 4, 0])
TAPS = {"stage1": ("stem", "stem"), "stage2": ("body", "body")}


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)))
    model.add_module("body", nn.Sequential(nn.Conv2d(width, width, 3, stride=2), nn.ReLU()))
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    model(IMAGES)
    return model


@pytest.fixture
def student():
    return net(4)


@pytest.fixture
def teacher():
    return net(7)


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_terms_are_those_of_the_losses(student, teacher):
    losses = [CE(weight=0.1), KD(weight=0.9), FCKA(stages=("stage2",), weights=(3.0,))]
    terms = Distiller(student, teacher, losses, TAPS)(IMAGES, TARGET)
    body = [model.stem(IMAGES) for model in (student, teacher)]
    body = [model.body(x) for model, x in zip((student, teacher), body, strict=True)]
    logits = [model.head(x) for model, x in zip((student, teacher), body, strict=True)]
    expected = {
        "loss_ce": 0.1 * nn.functional.cross_entropy(logits[0], TARGET),
        "loss_kd": 0.9 * kd_loss(*logits),
        "loss_fcka_stage2": 3 * fcka_loss(*body),
    }
    assert list(terms) == list(expected)
    torch.testing.assert_close(terms, expected)


def test_the_distillation_scale_is_a_factor_of_what_needs_the_teacher_alone(student, teacher):
    distiller = Distiller(student, teacher, [CE(), KD()]).eval()
    whole = distiller(IMAGES, TARGET)
    distiller.distillation_scale = 0.25
    scaled = distiller(IMAGES, TARGET)
    torch.testing.assert_close(scaled["loss_kd"], whole["loss_kd"] / 4)
    torch.testing.assert_close(scaled["loss_ce"], whole["loss_ce"])


def test_terms_of_the_teacher_are_scaled_to_another_terms_value(student, teacher):
    losses = [CE(weight=0.5), FCKA(stages=("stage2",), weights=3.0)]
    plain = Distiller(student, teacher, losses, TAPS).eval()(IMAGES, TARGET)
    terms = Distiller(student, teacher, losses, TAPS, relative_to="loss_ce").eval()(IMAGES, TARGET)
    # Its value is its weight times that of cross-entropy; its gradient has one factor for all.
    torch.testing.assert_close(terms["loss_ce"], plain["loss_ce"])
    torch.testing.assert_close(terms["loss_fcka_stage2"], 3 * plain["loss_ce"] / 0.5)
    factor = terms["loss_fcka_stage2"].detach() / plain["loss_fcka_stage2"].detach()
    own, scaled = (
        torch.autograd.grad(t["loss_fcka_stage2"], student.stem.parameters())
        for t in (plain, terms)
    )
    torch.testing.assert_close(scaled, tuple(factor * gradient for gradient in own))


def test_a_term_that_vanishes_is_not_scaled_without_bound(student):
    losses = [CE(), KD()]
    alike = Distiller(student, copy.deepcopy(student), losses, relative_to="loss_ce").eval()
    terms = alike(IMAGES, TARGET)
    assert terms["loss_kd"].abs() < 1 and all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize(
    ("name", "keys"),
    [("VID", {"stages": ["stage2"], "weights": 1.0}), ("ITRD", {"stage": "stage2"})],
)
def test_a_loss_that_can_be_negative_is_not_scaled(student, teacher, name, keys):
    losses = [CE(), KD(), build(name, **keys)]
    with pytest.raises(ValueError, match=rf"relative_to: terms of {name} can be negative, .*leave"):
        Distiller(student, teacher, losses, TAPS, relative_to="loss_ce")
    Distiller(student, teacher, losses, TAPS)


def test_the_term_that_others_are_relative_to_must_be_there(student, teacher):
    distiller = Distiller(student, teacher, [KD()], relative_to="loss_ce")
    with pytest.raises(ValueError, match="relative_to: no term 'loss_ce'; available: loss_kd"):
        distiller(IMAGES, TARGET)


def test_gradient_reaches_only_the_student(student, teacher):
    losses = [CE(), RCKA(stages=("stage1", "stage2"), feature_weights=(1.0, 1.0))]
    distiller = Distiller(student, teacher, losses, TAPS)
    sum(distiller(IMAGES, TARGET).values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in student.parameters()}


def test_the_teacher_is_no_part_of_the_state(student, teacher):
    distiller = Distiller(student, teacher, [KD()])
    assert isinstance(distiller.teacher, FrozenTeacher)
    assert set(distiller.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert dict(distiller.named_children()).keys() == {"student", "losses", "adapters"}


def test_the_teacher_stays_frozen_and_the_student_trains(student, teacher):
    distiller = Distiller(student, teacher, [KD()]).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller(IMAGES, TARGET)
    assert student.stem[1].training
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())


def test_the_teacher_follows_casts(student, teacher):
    distiller = Distiller(student, teacher, [KD()]).to(torch.float64)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64}
    assert distiller(IMAGES.double(), TARGET)["loss_kd"].dtype == torch.float64
    distiller.to("meta")
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}


def test_a_deep_copy_has_its_own_teacher(student, teacher):
    distiller = Distiller(student, teacher, [KD()])
    twin = copy.deepcopy(distiller).double()
    assert twin.teacher is not distiller.teacher
    assert next(teacher.parameters()).dtype == torch.float32


def test_no_teacher_is_needed_without_distillation(student):
    terms = Distiller(student, None, [CE()]).to(torch.float64)(IMAGES.double(), TARGET)
    assert list(terms) == ["loss_ce"]


def test_a_teacher_that_no_loss_needs_does_not_run(student, teacher):
    calls = count_calls(teacher)
    Distiller(student, teacher, [CE()])(IMAGES, TARGET)
    assert not calls


def test_taps_that_no_loss_needs_are_not_hooked(student, teacher):
    taps = {**TAPS, "unused": ("no such path", "no such path")}
    seen = {}

    class Spy(Loss):
        taps = ("stage2",)

        def terms(self, student: Outputs, teacher: Outputs | None, target):
            seen.update(student=set(student.features), teacher=set(teacher.features))
            return {"loss_spy": Term(1.0, student.logits.sum())}

    Distiller(student, teacher, [CE(), Spy()], taps)(IMAGES, TARGET)
    assert seen == {"student": {"stage2"}, "teacher": {"stage2"}}


def test_no_hooks_stay_between_steps(student, teacher):
    distiller = Distiller(student, teacher, [FCKA(stages=("stage2",))], TAPS)
    assert hooks(student) == hooks(teacher) == 0
    distiller(IMAGES, TARGET)
    assert hooks(student) == hooks(teacher) == 0


def test_the_teacher_sees_its_own_images(student, teacher):
    distiller = Distiller(student, teacher, [KD()]).eval()
    other = IMAGES.flip(3)
    terms = distiller(IMAGES, TARGET, teacher_images=other)
    expected = kd_loss(student(IMAGES), teacher(other))
    torch.testing.assert_close(terms["loss_kd"], expected)


def test_teacher_outputs_take_the_dtypes_of_the_student(student, teacher):
    seen = []

    class Spy(Loss):
        taps = ("stage2",)

        def terms(self, student: Outputs, teacher: Outputs | None, target):
            seen.extend((teacher.logits.dtype, teacher.feature("stage2").dtype))
            return {"loss_spy": Term(1.0, student.logits.sum())}

    distiller = Distiller(student, teacher, [Spy()], TAPS)
    student.bfloat16()
    distiller(IMAGES.bfloat16(), TARGET, teacher_images=IMAGES)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_losses_are_float32_under_autocast(student, teacher):
    losses = [CE(), KD(), RCKA(stages=("stage2",))]
    distiller = Distiller(student, teacher, losses, TAPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distiller(IMAGES, TARGET)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_parameters_of_losses_are_trained_and_saved(student, teacher):
    class Adapted(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def terms(self, student: Outputs, teacher: Outputs | None, target):
            return {"loss_adapted": Term(1.0, self.scale * student.logits.sum())}

    distiller = Distiller(student, teacher, [Adapted()])
    assert "losses.0.scale" in distiller.state_dict()


def test_refusals_at_construction(student, teacher):
    with pytest.raises(ValueError, match=r"losses must be a list, got KD; write \[\.\.\.\]"):
        Distiller(student, teacher, KD())
    for loss in (nn.MSELoss(), KD, "KD"):
        with pytest.raises(
            ValueError, match=r"losses must be pcka\.losses\.Loss objects, got .*CE"
        ):
            Distiller(student, teacher, [CE(), loss])
    with pytest.raises(ValueError, match=r"FCKA needs the tap 'last', got \['stage1'"):
        Distiller(student, teacher, [CE(), FCKA()], TAPS)
    with pytest.raises(ValueError, match="teacher: KD needs one, got None"):
        Distiller(student, None, [CE(), KD()])
    with pytest.raises(ValueError, match=r"tap 'stage2': .* no module 'bodi'; near.*body"):
        Distiller(student, teacher, [FCKA(stages=("stage2",))], {"stage2": ("body", "bodi")})
    with pytest.raises(ValueError, match="teacher shares parameters with student"):
        Distiller(student, student, [KD()])
    teacher.stem[1]._buffers["running_mean"] = student.stem[1].running_mean
    with pytest.raises(ValueError, match=r"shares buffers with student, .*copy\.deepcopy"):
        Distiller(student, teacher, [KD()])


def test_preparing_gives_every_module_its_own_mode_back(student, teacher):
    """Frozen batch norms stay frozen, and an error leaves nothing in evaluation mode."""
    distiller = Distiller(student.train(), teacher, [FitNet(stages=("stage2",))], TAPS)
    student.stem[1].eval()
    statistics = {name: value.clone() for name, value in student.named_buffers()}
    before = [module.training for module in student.modules()]
    distiller.prepare(IMAGES)
    assert [module.training for module in student.modules()] == before
    with pytest.raises(RuntimeError):
        distiller.prepare(IMAGES[:, :1])
    assert [module.training for module in student.modules()] == before
    assert all(torch.equal(value, statistics[name]) for name, value in student.named_buffers())


class Answering(nn.Module):
    """A model whose logits come in something."""

    def __init__(self, model: nn.Module, wrap) -> None:
        super().__init__()
        self.model = model
        self.wrap = wrap

    def forward(self, images):
        return self.wrap(self.model(images))


class Aux(NamedTuple):
    """As torchvision's Inception answers in training."""

    aux: torch.Tensor
    logits: torch.Tensor


ANSWERS = {
    "dict": (lambda x: {"aux": -x, "logits": x}, None),
    "object": (lambda x: SimpleNamespace(loss=None, logits=x), None),
    "named tuple": (lambda x: Aux(-x, x), None),
    "tuple": (lambda x: (None, x, -x), None),
    "key": (lambda x: {"logits": -x, "scores": x}, "scores"),
    "attribute": (lambda x: SimpleNamespace(scores=x), "scores"),
    "number": (lambda x: [-x, x], "1"),
    "function": (lambda x: [[-x], [x]], lambda output: output[1][0]),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_logits_are_found_in_what_models_return(student, teacher, answer):
    wrap, logits_of = ANSWERS[answer]
    expected = Distiller(student, teacher, [CE(), KD()])(IMAGES, TARGET)
    wrapped = Answering(student, wrap), Answering(teacher, wrap)
    distiller = Distiller(*wrapped, [CE(), KD()], logits_of=logits_of)
    torch.testing.assert_close(distiller(IMAGES, TARGET), expected, rtol=0, atol=0)
    mixed = FrozenTeacher(wrapped[1], logits_of=logits_of)
    distiller = Distiller(student, mixed, [CE(), KD()])
    torch.testing.assert_close(distiller(IMAGES, TARGET), expected, rtol=0, atol=0)
    assert type(distiller.observe_teacher(IMAGES).raw) is type(wrap(TARGET))


@pytest.mark.parametrize("wrap", [lambda x: {"out": x}, lambda x: ([x], None), lambda x: None])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_logits_is_named_where_a_loss_needs_them(student, teacher, role, wrap):
    models = {"student": student, "teacher": teacher}
    models[role] = Answering(models[role], wrap)
    distiller = Distiller(models["student"], models["teacher"], [KD()])
    message = rf"{role}: KD needs logits .*Answering returned \((dict|tuple|NoneType)\).*logits_of"
    with pytest.raises(ValueError, match=message):
        distiller(IMAGES, TARGET)
    with pytest.raises(ValueError, match=message):
        distiller.prepare(IMAGES)
    taps = {"body": tuple("model.body" if name == role else "body" for name in models)}
    terms = Distiller(models["student"], models["teacher"], [FCKA(stages=["body"])], taps)(
        IMAGES, None
    )
    assert terms["loss_fcka_body"].isfinite()


def test_one_path_serves_both_models(student, teacher):
    losses = [FCKA(stages=["body"])]
    terms = [
        Distiller(student, teacher, losses, {"body": paths})(IMAGES, TARGET)
        for paths in ("body", ("body", "body"))
    ]
    torch.testing.assert_close(*terms, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"'body' must be \(student path, teacher path\) or one"):
        Distiller(student, teacher, losses, {"body": ("stem", "body", "head")})


def test_terms_come_weighted_and_raw_on_outputs_that_the_caller_has(student, teacher):
    losses = [CE(weight=0.1), FCKA(stages=["stage1", "stage2"], weights=[3.0, 0.5])]
    distiller = Distiller(student, teacher, losses, TAPS)
    distiller.distillation_scale = 0.25
    given = distiller.observe_student(IMAGES), distiller.observe_teacher(IMAGES)
    terms = distiller.terms(*given, TARGET)
    weights = {"loss_ce": 0.1, "loss_fcka_stage1": 0.75, "loss_fcka_stage2": 0.125}
    assert {name: term.weight for name, term in terms.items()} == pytest.approx(weights)
    features = (outputs.feature("stage1") for outputs in given)
    torch.testing.assert_close(terms["loss_fcka_stage1"].value, fcka_loss(*features))
    weighted = {name: term.weighted for name, term in terms.items()}
    torch.testing.assert_close(weighted, distiller(IMAGES, TARGET))
    sum(weighted.values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_outputs_may_carry_what_only_the_callers_loss_reads(student, teacher):
    class OnRaw(Loss):
        def terms(self, student: Outputs, teacher: Outputs | None, target):
            return {
                "loss_raw": Term(2.0, (student.raw["aux"] - teacher.raw["aux"]).square().mean())
            }

    answer = lambda x: {"aux": 3 * x}  # noqa: E731
    distiller = Distiller(Answering(student, answer), Answering(teacher, answer), [OnRaw()])
    expected = 18 * (student(IMAGES) - teacher(IMAGES)).square().mean()
    torch.testing.assert_close(distiller(IMAGES, None)["loss_raw"], expected)


def test_a_loss_without_terms_is_named(student):
    class Silent(Loss):
        needs_teacher = False

        def terms(self, student: Outputs, teacher: Outputs | None, target):
            return {}

    with pytest.raises(ValueError, match="losses: Silent gives no term; check its settings"):
        Distiller(student, None, [CE(), Silent()])(IMAGES, TARGET)


def test_a_loss_that_refuses_soft_targets_is_named_with_its_reason(student):
    class OneClass(CE):
        refuses_soft_targets = "it counts classes"

    soft = nn.functional.one_hot(TARGET, 5).float()
    message = (
        r"target: OneClass cannot use mixed samples .*: it counts classes; do not mix, or leave"
    )
    with pytest.raises(ValueError, match=message):
        Distiller(student, None, [OneClass()])(IMAGES, soft)
    given = [Distiller(student, None, [OneClass()])(IMAGES, TARGET)]
    given.append(Distiller(student, None, [CE()])(IMAGES, soft))
    torch.testing.assert_close(given[0]["loss_oneclass"], given[1]["loss_ce"])


def test_losses_of_one_class_go_together_under_two_names(student):
    smooth = CE(weight=2.0, label_smoothing=0.5)
    smooth.log_name = "smooth"
    terms = Distiller(student, None, [CE(), smooth])(IMAGES, TARGET)
    assert list(terms) == ["loss_ce", "loss_smooth"]


def test_two_losses_do_not_share_a_name(student):
    distiller = Distiller(student, None, [CE(), CE(weight=2.0)])
    with pytest.raises(ValueError, match="CE gives loss_ce, as another loss already does"):
        distiller(IMAGES, TARGET)
