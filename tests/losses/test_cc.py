from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka.losses import CC, Outputs, cc_loss, cc_neighbours_loss


def numpy_neighbours(student: np.ndarray, teacher: np.ndarray) -> float:
    """Sample by sample, entry by entry."""
    products = [
        sum(abs(s1 - t1) * abs(s2 - t2) for s1, t1, s2, t2 in zip(*rows))
        for rows in zip(student, teacher, student[1:], teacher[1:])
    ]
    return np.mean(products)


def test_neighbours_from_the_definition(draw):
    student, teacher = draw(0, 5, 4), draw(1, 5, 4)
    expected = numpy_neighbours(student.numpy(), teacher.numpy())
    assert cc_neighbours_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_both_embeddings_are_trained(draw):
    student, teacher = draw(0, 5, 4).requires_grad_(), draw(1, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(cc_neighbours_loss, (student, teacher))


def test_embeddings_of_other_shapes_are_refused(draw):
    with pytest.raises(ValueError, match=r"embeddings of one shape \(B, D\); got student \(5, 4\)"):
        cc_neighbours_loss(draw(0, 5, 4), draw(1, 5, 3))
    with pytest.raises(ValueError, match=r"embeddings of one shape"):
        cc_neighbours_loss(draw(0, 5, 4, 2), draw(1, 5, 4, 2))


@pytest.fixture
def outputs(draw):
    student = {"pooled": draw(0, 5, 6), "map": draw(1, 5, 3, 4, 4)}
    teacher = {"pooled": draw(2, 5, 9), "map": draw(3, 5, 7, 2, 2)}
    return Outputs(features=student), Outputs(features=teacher)


def test_published_setting():
    loss = CC()
    assert (loss.taps, loss.weights, loss.form, loss.embedding) == (
        ("pooled",), (0.02,), "neighbours", 128,
    )  # fmt: skip


def test_both_models_are_embedded_by_a_linear_layer(outputs):
    loss = CC(stages=("pooled", "map"), weights=(2.0, 0.5), embedding=16)
    loss.prepare(*outputs)
    terms = loss(*outputs, None)
    for stage, weight in (("pooled", 2.0), ("map", 0.5)):
        embedded = []
        embeddings = loss.student_embeddings, loss.teacher_embeddings
        for model, layers in zip(outputs, embeddings):
            x = model.feature(stage).numpy()
            x = x if x.ndim == 2 else x.mean((2, 3))
            w, b = (p.detach().numpy() for p in (layers[stage].weight, layers[stage].bias))
            embedded.append(x @ w.T + b)
        assert embedded[0].shape == embedded[1].shape == (5, 16)
        expected = weight * numpy_neighbours(*embedded)
        assert terms[f"loss_cc_{stage}"].item() == pytest.approx(expected, rel=1e-10)


def test_gradient_trains_both_embeddings_and_not_the_teacher(outputs):
    student, teacher = (model.feature("pooled").requires_grad_() for model in outputs)
    loss = CC()
    loss.prepare(*outputs)
    loss(*outputs, None)["loss_cc_pooled"].backward()
    assert student.grad.norm() > 0
    assert teacher.grad is None
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    assert len(list(loss.parameters())) == 4


def test_bilinear_form_needs_no_embedding(outputs):
    loss = CC(form="bilinear", weights=(3.0,))
    loss.prepare(*outputs)
    assert not list(loss.parameters())
    expected = 3 * cc_loss(*(model.feature("pooled") for model in outputs))
    torch.testing.assert_close(loss(*outputs, None)["loss_cc_pooled"], expected)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"form must be one of neighbours, bilinear; got 'rbf'"):
        CC(form="rbf")


@pytest.mark.parametrize("embedding", [0, -3])
def test_an_embedding_has_a_width(embedding):
    with pytest.raises(ValueError, match="embedding must be an integer of at least 1, got"):
        CC(embedding=embedding)
