from __future__ import annotations

import pytest
import torch

from pcka.losses import CE, Outputs

TARGET = torch.tensor([0, 3, 1, 4])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_is_the_weighted_mean_over_samples(draw, smoothing):
    logits = draw(0, 4, 5)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(1 - smoothing) * log_p[range(4), TARGET] - smoothing * log_p.mean(1)
    terms = CE(weight=0.5, label_smoothing=smoothing)(Outputs(logits), None, TARGET)
    assert list(terms) == ["loss_ce"]
    torch.testing.assert_close(terms["loss_ce"], 0.5 * expected.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_are_smoothed_too(draw, smoothing):
    logits, shares = draw(0, 4, 5), draw(1, 4, 5).softmax(1)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(((1 - smoothing) * shares + smoothing / 5) * log_p).sum(1)
    loss = CE(label_smoothing=smoothing)(Outputs(logits), None, shares)["loss_ce"]
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_widened_first(draw, dtype):
    logits = draw(0, 4, 5).to(dtype)
    loss = CE()(Outputs(logits), None, TARGET)["loss_ce"]
    assert loss.dtype == torch.float32
    assert loss == CE()(Outputs(logits.float()), None, TARGET)["loss_ce"]


def test_needs_a_target_and_no_teacher(draw):
    assert CE().needs_target and not CE().needs_teacher
    with pytest.raises(ValueError, match="target: CE needs it"):
        CE()(Outputs(draw(0, 4, 5)), None, None)
    with pytest.raises(ValueError, match=r"student\.logits: CE needs it"):
        CE()(Outputs(), None, TARGET)


@pytest.mark.parametrize("smoothing", [7, -0.1, float("nan")])
def test_smoothing_is_a_probability(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got"):
        CE(label_smoothing=smoothing)
