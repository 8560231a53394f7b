"""What the page of pcka.losses promises of all functions and modules alike."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from pcka import losses
from pcka.losses import registry

FUNCTIONS = sorted(name for name in registry.MODULE_OF if name.endswith("_loss"))
NOT_OF_BOTH_MODELS = {"crd_loss"}  # scores, made of trained embeddings
TRAINS_BOTH = {"cc_neighbours_loss", "fgd_relation_loss"}
OF_LOGITS = {
    "ctkd_loss", "dist_loss", "dkd_loss", "ikl_loss", "kd_loss", "lcka_loss", "mlkd_loss",
    "nkd_loss", "rld_loss", "wttm_loss",
}  # fmt: skip
OF_ROWS = {"cc_neighbours_loss", "itrd_loss", "srrl_loss", "vkd_loss"}
COMPARING = sorted(set(FUNCTIONS) - NOT_OF_BOTH_MODELS)
OF_POSITIONS = {
    "dense_boxes_loss": (6, 8, 4),
    "dense_scores_loss": (6, 8, 5),
    "ld_loss": (6, 8, 4, 3),
    "roi_boxes_loss": (6, 3, 4),
}
SETTINGS = {"patched_loss": {"patch_size": 2}, "pcka_loss": {"patch_size": 2}}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(draw, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """What the function compares, of the student and of the teacher."""
    shape = (6, 5) if name in OF_LOGITS | OF_ROWS else (6, 4, 8, 8)
    shape = OF_POSITIONS.get(name, shape)
    count = 2 if name in ("kdsvd_loss", "rcka_loss") else 1
    shapes = [shape, (6, 5)] if name == "rcka_loss" else [shape] * count
    return tuple([draw(seed + i, *s) for i, s in enumerate(shapes)] for seed in (0, 10))


def call(name: str, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    function = getattr(losses, name)
    scores = torch.linspace(-2, 2, 6 * 8 * 5).view(6, 8, 5)
    extra = {
        "dense_boxes_loss": [scores],
        "ld_loss": [scores],
        "roi_boxes_loss": [scores[:, 0, :4]],
        "fgd_loss": [torch.tensor([[0, 0.1, 0.1, 0.5, 0.5], [3, 0.2, 0.4, 0.9, 0.9]])],
        "ifvd_loss": [torch.arange(6 * 4 * 4).view(6, 4, 4) % 4 - 1, 3],
        "ctkd_loss": [torch.tensor(4.0)],
        "dkd_loss": [torch.arange(6) % 5],
        "nkd_loss": [torch.arange(6) % 5],
        "rld_loss": [torch.arange(6) % 5],
        "ofd_loss": [torch.full((4,), -0.5)],
        "srrl_loss": [lambda x: x[:, :3].square()],
        "vid_loss": [torch.ones(4)],
    }.get(name, [])
    if name == "kdsvd_loss":
        return function(student, teacher)
    pairs = [tensor for pair in zip(student, teacher) for tensor in pair]
    return function(*pairs, *extra, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_tensors_by_position_and_settings_by_keyword(name):
    for parameter in inspect.signature(getattr(losses, name)).parameters.values():
        is_setting = parameter.default is not inspect.Parameter.empty
        assert is_setting == (parameter.kind is inspect.Parameter.KEYWORD_ONLY), parameter


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_models_may_run_in_two_dtypes_and_sums_are_exact(draw, name, own, other):
    student, teacher = tensors(draw, name)
    student, teacher = [x.to(own) for x in student], [x.to(other) for x in teacher]
    loss = call(name, student, teacher)
    double = torch.float64 in (own, other)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    exact = call(name, [x.double() for x in student], [x.double() for x in teacher])
    torch.testing.assert_close(loss.double(), exact, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", COMPARING)
def test_gradient_reaches_the_student_and_not_the_teacher(draw, name):
    student, teacher = tensors(draw, name)
    for x in (*student, *teacher):
        x.requires_grad_()
    call(name, student, teacher).backward()
    assert all(x.grad.norm() > 0 for x in student)
    assert all((x.grad is not None) == (name in TRAINS_BOTH) for x in teacher)


LISTS = [
    (name, key)
    for name in losses.names()
    for key, value in losses.defaults(name).items()
    if isinstance(value, tuple)
]


@pytest.mark.parametrize(("name", "key"), LISTS)
def test_text_in_the_place_of_a_list_is_refused(name, key):
    with pytest.raises(ValueError, match=rf"{key} must .*got 'text'"):
        losses.build(name, **{key: "text"})


@pytest.mark.parametrize(
    ("name", "key"), [(n, k) for n, k in LISTS if k not in ("stages", "relations", "temperatures")]
)
def test_one_value_serves_all_stages_bare_or_in_a_list(name, key):
    built = [losses.build(name, stages=["a", "b"], **{key: value}) for value in (3, [3], [3, 3])]
    settings = []
    for loss in built:
        of_stages = loss.feature_loss if name == "RCKA" else loss
        settings.append(getattr(of_stages, key.removeprefix("feature_")))
    assert settings == [(3, 3)] * 3
