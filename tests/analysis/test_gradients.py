from __future__ import annotations

import math

import pytest
import torch

from pcka.analysis.gradients import TermGradient, far_apart, term_gradients


@pytest.fixture
def parameters():
    return [torch.zeros(2, 1, requires_grad=True), torch.zeros(1, requires_grad=True)]


def plane(parameters, x, y, z=0.0):
    """A term whose gradient by the three numbers is (x, y, z)."""
    weight, bias = parameters
    return x * weight[0, 0] + y * weight[1, 0] + z * bias.sum()


def test_share_and_cosine_over_all_parameters(parameters):
    terms = {
        "loss_ce": plane(parameters, 3, 0, 4),
        "loss_same": plane(parameters, 6, 0, 8),
        "loss_across": plane(parameters, 0, 2),
        "loss_against": plane(parameters, 0, 0, -3),
    }
    found = term_gradients(terms, parameters, "loss_ce")
    shares, cosines = (5, 10, 2, 3), (1, 1, 0, -4 / 5)
    for name, share, cosine in zip(terms, shares, cosines, strict=True):
        assert found[name] == pytest.approx(TermGradient(share / 20, cosine))


def test_the_graph_is_left_for_the_backward_pass(parameters):
    terms = {"loss_ce": plane(parameters, 3, 1), "loss_kd": plane(parameters, 1, 1)}
    term_gradients(terms, parameters, "loss_ce")
    assert all(parameter.grad is None for parameter in parameters)
    sum(terms.values()).backward()
    assert parameters[0].grad.flatten().tolist() == [4, 2]


def test_a_term_without_a_gradient_has_no_share_and_no_direction(parameters):
    frozen = torch.ones(3)
    constant, elsewhere = torch.tensor(2.0), torch.ones(1, requires_grad=True).sum()
    terms = {"loss_ce": plane(parameters, 3, 4), "loss_a": constant, "loss_b": elsewhere}
    found = term_gradients(terms, [*parameters, frozen], "loss_ce")
    assert found == {"loss_ce": (1, 1), "loss_a": (0, 0), "loss_b": (0, 0)}
    nothing = term_gradients({"loss_ce": constant}, parameters, "loss_ce")
    assert nothing == {"loss_ce": (0, 0)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_gives_no_numbers(parameters, value):
    terms = {"loss_ce": plane(parameters, 3, 0), "loss_kd": plane(parameters, value, -value)}
    found = term_gradients(terms, parameters, "loss_ce")
    assert math.isnan(found["loss_kd"].share) and math.isnan(found["loss_kd"].cosine)


def test_gradients_too_small_for_float32_squares_are_measured(parameters):
    terms = {"loss_ce": plane(parameters, 1e-30, 0), "loss_kd": plane(parameters, 1e-30, 1e-30)}
    assert term_gradients(terms, parameters, "loss_ce")["loss_kd"].cosine == pytest.approx(
        math.sqrt(0.5)
    )


def test_a_reference_that_is_no_term_is_refused(parameters):
    with pytest.raises(ValueError, match="no term 'loss_ce'; available: loss_kd"):
        term_gradients({"loss_kd": plane(parameters, 1, 0)}, parameters, "loss_ce")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (
            {"ce": 0.9995, "kd": 0.0004},
            "the gradient of ce is 2,499 times as long as that of kd (epoch 4)",
        ),
        ({"ce": 0.0, "kd": 1.0}, "the gradient of kd completely dominates that of ce (epoch 4)"),
        ({"ce": 0.99, "kd": 0.01}, None),
        ({"ce": 1.0}, None),
        ({"ce": 0.0, "kd": 0.0}, None),
    ],
)
def test_a_term_that_pulls_a_thousand_times_as_hard_is_told(shares, said):
    even = {"epoch": 2, "gradient_share_ce": 0.5, "gradient_share_kd": 0.5}
    last = {"epoch": 4} | {f"gradient_share_{term}": share for term, share in shares.items()}
    found = list(far_apart([even, last, {"epoch": 5, "loss_ce": 1.0}]))
    assert len(found) == (said is not None)
    assert all(text.startswith(said) for text in found)


def test_without_measured_gradients_nothing_is_told():
    assert list(far_apart([{"epoch": 1, "loss_ce": 1.0}])) == []
