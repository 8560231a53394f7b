from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import cka
from pcka.losses import LCKA, DegenerateLevelWarning, Outputs, lcka_loss

RECORDS = [
    (f"cka_uncentered_{transposed}l2{row_normalize}", transposed, row_normalize)
    for transposed in ("", "transposed_")
    for row_normalize in (False, True)
]


@pytest.mark.parametrize(("name", "transposed", "row_normalize"), RECORDS)
def test_record_of_the_original_implementation(meets_record, name, transposed, row_normalize):
    weights = {"intra_weight": float(not transposed), "inter_weight": float(bool(transposed))}

    def loss(student, teacher):
        options = {"center": False, "row_normalize": row_normalize}
        return lcka_loss(student, teacher, **weights, **options) - 1

    meets_record(name, loss)


def test_record_of_both_relations_of_maps(meets_record):
    def loss(student, teacher):
        x, y = student.flatten(1), teacher.flatten(1)
        options = {"center": False, "row_normalize": True}
        rows, columns = cka(x, y, **options), cka(x.mT, y.mT, **options)
        return -10 * rows - 10 * columns

    meets_record("cka_seg", loss)


def numpy_cka(x: np.ndarray, y: np.ndarray, *, center: bool, row_normalize: bool) -> float:
    """Alignment entry by entry of the Grams, centered by an explicit H K H."""
    n = len(x)
    h = np.eye(n) - center * np.ones((n, n)) / n
    k, l = (h @ z @ z.T @ h for z in (x, y))
    if row_normalize:
        k, l = (g / np.sqrt(np.diag(g))[:, None] for g in (k, l))
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def numpy_lcka(student, teacher, *, temperature, **options) -> tuple[float, float]:
    x, y = student.numpy(), teacher.numpy()
    if temperature is not None:
        x, y = (np.exp(z / temperature) for z in (x, y))
        x, y = (z / z.sum(1, keepdims=True) for z in (x, y))
    return 1 - numpy_cka(x, y, **options), 1 - numpy_cka(x.T, y.T, **options)


@pytest.mark.parametrize("temperature", [None, 4.0])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("row_normalize", [True, False])
def test_terms_from_the_definition(draw, temperature, center, row_normalize):
    student, teacher = draw(0, 9, 6, scale=3), draw(1, 9, 6, scale=3) + 1
    options = {"temperature": temperature, "center": center, "row_normalize": row_normalize}
    intra, inter = numpy_lcka(student, teacher, **options)
    loss = lcka_loss(student, teacher, intra_weight=2.0, inter_weight=5.0, **options)
    assert loss.item() == pytest.approx(2 * intra + 5 * inter, rel=1e-10)
    module = LCKA(intra_weight=2.0, inter_weight=5.0, **options)
    terms = module(Outputs(student), Outputs(teacher), None)
    assert list(terms) == ["loss_lcka_intra", "loss_lcka_inter"]
    assert terms["loss_lcka_intra"].item() == pytest.approx(2 * intra, rel=1e-10)
    assert terms["loss_lcka_inter"].item() == pytest.approx(5 * inter, rel=1e-10)


def test_scaled_logits_cost_nothing(draw):
    logits = draw(0, 9, 6)
    assert lcka_loss(2.5 * logits, logits).item() == pytest.approx(0, abs=1e-12)


def test_gradient_reaches_only_the_student(draw):
    student, teacher = draw(0, 9, 6).requires_grad_(), draw(1, 9, 6).requires_grad_()
    lcka_loss(student, teacher, temperature=2.0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_widened_before_the_softmax(draw, dtype):
    student, teacher = draw(0, 9, 6, scale=9).to(dtype), draw(1, 9, 6, scale=9).to(dtype)
    loss = lcka_loss(student, teacher, temperature=1.0)
    assert loss.dtype == torch.float32
    exact = lcka_loss(student.double(), teacher.double(), temperature=1.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_round_the_alignment(draw):
    student, teacher = draw(0, 9, 6).float(), draw(1, 9, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lcka_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(inside, lcka_loss(student, teacher, temperature=2.0))


def test_two_samples_leave_the_classes_to_be_aligned(draw):
    student = draw(0, 2, 6).requires_grad_()
    outputs = Outputs(student), Outputs(draw(1, 2, 6))
    with pytest.warns(DegenerateLevelWarning, match="loss_lcka_intra: ") as caught:
        terms = [LCKA()(*outputs, None) for _ in range(2)][-1]
    assert len(caught) == 1
    assert terms["loss_lcka_intra"].item() == 0
    assert terms["loss_lcka_inter"].item() > 0
    assert torch.autograd.grad(terms["loss_lcka_intra"], student)[0].count_nonzero() == 0


def test_two_classes_leave_the_samples_to_be_aligned(draw):
    outputs = Outputs(draw(0, 6, 2)), Outputs(draw(1, 6, 2))
    with pytest.warns(DegenerateLevelWarning, match="loss_lcka_inter: "):
        terms = LCKA()(*outputs, None)
    assert terms["loss_lcka_inter"].item() == 0
    assert terms["loss_lcka_intra"].item() > 0


def test_refusals(draw):
    with pytest.raises(ValueError, match="logits of one shape"):
        lcka_loss(draw(0, 6, 5), draw(1, 6, 4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        lcka_loss(draw(0, 6, 5), draw(1, 6, 5), temperature=0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        LCKA(temperature=0.0)
    with pytest.raises(ValueError, match=r"teacher\.logits: LCKA needs it"):
        LCKA()(Outputs(draw(0, 6, 5)), Outputs(), None)


@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"center": False}])
def test_a_class_that_is_masked_out_leaves_loss_and_gradient_finite(draw, masked, options):
    student, teacher = draw(0, 8, 5), draw(1, 8, 5)
    for role, logits in (("student", student), ("teacher", teacher)):
        if masked in (role, "both"):
            logits[:, 2] = -torch.inf
    student.requires_grad_()
    loss = lcka_loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.norm() > 0
    if not options:
        rest = [0, 1, 3, 4]
        without = lcka_loss(student[:, rest], teacher[:, rest], inter_weight=0.0)
        masked_loss = lcka_loss(student, teacher, inter_weight=0.0)
        torch.testing.assert_close(masked_loss, without)
