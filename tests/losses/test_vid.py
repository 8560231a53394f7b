from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pcka.losses import VID, Outputs, vid_loss


def numpy_vid(mean: np.ndarray, teacher: np.ndarray, variance: np.ndarray) -> float:
    """Minus the logarithm of the Gaussian density, without ``log sqrt(2 pi)``, entry by entry."""
    variance = variance[:, None, None]
    density = np.exp(-((teacher - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    return np.mean(-np.log(density) - np.log(np.sqrt(2 * np.pi)))


def test_likelihood_from_the_density(draw):
    mean, teacher, variance = draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4, 5), draw(2, 3).exp()
    expected = numpy_vid(mean.numpy(), teacher.numpy(), variance.numpy())
    assert vid_loss(mean, teacher, variance).item() == pytest.approx(expected, rel=1e-12)


def test_the_best_variance_is_the_mean_square_of_each_channel(draw):
    mean, teacher = draw(0, 2, 3, 4, 5), draw(1, 2, 3, 4, 5)
    variance = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
    vid_loss(mean, teacher, variance).backward()
    torch.testing.assert_close(variance.grad, torch.zeros(3, dtype=torch.float64))


def test_gradient_reaches_prediction_and_variance_alone(draw):
    mean, teacher, raw = (draw(i, 2, 3, 2, 2).requires_grad_() for i in range(3))
    variance = raw[0, :, 0, 0].detach().exp().requires_grad_()
    vid_loss(mean, teacher, variance).backward()
    assert mean.grad.norm() > 0
    assert variance.grad.norm() > 0
    assert teacher.grad is None


def test_refusals(draw):
    with pytest.raises(ValueError, match=r"one shape \(B, C, H, W\)"):
        vid_loss(draw(0, 2, 3, 4, 4), draw(1, 2, 5, 4, 4), torch.ones(3))
    with pytest.raises(
        ValueError, match=r"variance must hold one value for each of the 3 channels"
    ):
        vid_loss(draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match=r"variance must be finite and above epsilon"):
        VID(variance=1e-6)
    with pytest.raises(ValueError, match=r"variance must be finite and above epsilon"):
        VID(variance=math.inf)
    with pytest.raises(ValueError, match=r"weights must hold one value for each of the 1"):
        VID(stages=("a",))


@pytest.fixture
def outputs(draw):
    """Stage ``a`` has a larger student, ``b`` a larger teacher."""
    student = {"a": draw(0, 5, 3, 8, 8), "b": draw(1, 5, 6, 4, 4)}
    teacher = {"a": draw(2, 5, 4, 4, 4), "b": draw(3, 5, 7, 8, 8)}
    return Outputs(features=student), Outputs(features=teacher)


@pytest.fixture
def loss(outputs):
    loss = VID(stages=("a", "b"), weights=(2.0, 0.5))
    loss.prepare(*outputs)
    return loss


@pytest.mark.parametrize("variance", [1.1e-5, 0.1, 5.0, 1000.0])
def test_variance_starts_as_told(outputs, variance):
    loss = VID(stages=("a",), weights=1.0, variance=variance)
    loss.prepare(*outputs)
    raw = loss.predictors["a"].raw_variance.detach().double()
    started = torch.nn.functional.softplus(raw) + loss.epsilon
    torch.testing.assert_close(started, torch.full_like(raw, variance), rtol=1e-5, atol=0)


def test_variance_starts_at_5_and_stays_above_epsilon(loss, outputs):
    for stage, channels in (("a", 4), ("b", 7)):
        raw = loss.predictors[stage].raw_variance
        assert raw.shape == (channels,)
        expected = np.log1p(np.exp(raw.detach().numpy())) + 1e-5
        np.testing.assert_allclose(expected, 5, rtol=1e-6)
    with torch.no_grad():
        loss.predictors["a"].raw_variance.fill_(-1e4)
    assert loss(*outputs, None)["loss_vid_a"].isfinite()


def test_three_convolutions_predict_the_teacher_at_the_smaller_size(loss, outputs):
    student, teacher = ({k: v.numpy() for k, v in o.features.items()} for o in outputs)
    halved = {
        "a": (student["a"].reshape(5, 3, 4, 2, 4, 2).mean((3, 5)), teacher["a"]),
        "b": (student["b"], teacher["b"].reshape(5, 7, 4, 2, 4, 2).mean((3, 5))),
    }
    terms = loss(*outputs, None)
    for stage, weight in (("a", 2.0), ("b", 0.5)):
        y, target = halved[stage]
        kernels = [p.detach().numpy()[:, :, 0, 0] for p in loss.predictors[stage].mean.parameters()]
        assert len(kernels) == 3  # none has a bias
        for i, kernel in enumerate(kernels):
            y = np.einsum("bihw,oi->bohw", np.maximum(y, 0) if i else y, kernel)
        expected = weight * numpy_vid(y, target, np.full(target.shape[1], 5.0))
        assert terms[f"loss_vid_{stage}"].item() == pytest.approx(expected, rel=1e-6)


def test_features_that_are_no_maps_are_refused_when_preparing(draw):
    pooled = Outputs(features={"pooled": draw(0, 5, 3)})
    with pytest.raises(ValueError, match=r"feature maps \(B, C, H, W\).*Tap a module before"):
        VID(stages=("pooled",), weights=(1.0,)).prepare(pooled, pooled)
