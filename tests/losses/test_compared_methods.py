"""The methods that the field compares with: figures of their original implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcka import losses
from pcka.losses import (
    at_loss,
    cc_loss,
    dist_loss,
    dkd_loss,
    nkd_loss,
    nst_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
)

RECORDS = {
    "at": at_loss,
    "at_mmrazor": at_loss,
    "cc_bilinear": cc_loss,
    "dist_T4": dist_loss,
    "dkd": dkd_loss,
    "nkd": nkd_loss,
    "nst": nst_loss,
    "pkt": pkt_loss,
    "rkd": rkd_loss,
    "sp": sp_loss,
}


@pytest.mark.parametrize("name", RECORDS)
def test_record_of_the_original_implementation(meets_record, name):
    meets_record(name, RECORDS[name])


@pytest.mark.parametrize("loss", [at_loss, nst_loss])
def test_the_larger_map_is_pooled_to_the_smaller(draw, loss):
    student, teacher = draw(0, 2, 3, 4, 6), draw(1, 2, 5, 8, 6)
    pooled = teacher.view(2, 5, 4, 2, 6).mean(3)
    assert loss(student, teacher).item() == pytest.approx(loss(student, pooled).item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"feature maps \(B, C, H, W\).*Tap a module before"):
        loss(draw(0, 2, 3), teacher)


def test_dkd_parts_are_the_binary_and_the_other_divergence(draw):
    student, teacher = draw(0, 6, 5, scale=3), draw(1, 6, 5, scale=3)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    temperature = 2.0
    total = {}
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        settings = {"alpha": alpha, "beta": beta, "temperature": temperature}
        total[alpha] = dkd_loss(student, teacher, target, **settings).item()
    binary, others = 0.0, 0.0
    for s, t, own in zip(student.numpy(), teacher.numpy(), target.tolist()):
        p_s, p_t = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (s, t))
        b_s, b_t = (np.array([p[own], 1 - p[own]]) for p in (p_s, p_t))
        q_s, q_t = (np.delete(p, own) / (1 - p[own]) for p in (p_s, p_t))
        binary += (b_t * np.log(b_t / b_s)).sum() / 6
        others += (q_t * np.log(q_t / q_s)).sum() / 6
    assert total[1.0] == pytest.approx(temperature**2 * binary, rel=1e-9)
    assert total[0.0] == pytest.approx(temperature**2 * others, rel=1e-9)


def test_dist_does_not_see_what_correlation_does_not_see(draw):
    logits = draw(0, 6, 5)
    assert dist_loss(logits + 3, logits).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("loss", [sp_loss, pkt_loss, cc_loss, rkd_loss])
def test_relations_do_not_see_a_rotation(draw, loss):
    features = draw(0, 6, 5)
    rotation, _ = torch.linalg.qr(draw(1, 5, 5))
    assert loss(features @ rotation, features).item() == pytest.approx(0, abs=1e-9)


def test_rkd_does_not_see_scale_and_shift(draw):
    features = draw(0, 6, 5)
    assert rkd_loss(3 * features + 2, features).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
def test_of_soft_targets_the_likeliest_class_counts(draw, loss):
    student, teacher = draw(0, 4, 3), draw(1, 4, 3)
    soft = torch.tensor([[0.6, 0.4, 0], [0, 0.1, 0.9], [0, 1, 0], [0.3, 0, 0.7]])
    classes = torch.tensor([0, 2, 1, 2])
    assert loss(student, teacher, soft) == loss(student, teacher, classes)


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss])
@pytest.mark.parametrize("target", [torch.zeros(5, dtype=torch.int64), torch.zeros(6)])
def test_targets_have_to_be_class_indices(draw, loss, target):
    with pytest.raises(ValueError, match="target must hold a class index for each of the 6"):
        loss(draw(0, 6, 5), draw(1, 6, 5), target)


@pytest.mark.parametrize("loss", [sp_loss, pkt_loss, rkd_loss, cc_loss, at_loss, nst_loss])
def test_other_samples_are_refused(draw, loss):
    with pytest.raises(ValueError, match="the same samples"):
        loss(draw(0, 6, 3, 4, 4), draw(1, 5, 3, 4, 4))


@pytest.mark.parametrize("name", ["DKD", "NKD", "DIST"])
def test_temperature_has_to_be_positive(name):
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.build(name, temperature=0.0)


@pytest.mark.parametrize("p", [0.0, -1.0, float("inf")])
def test_the_power_of_attention_is_positive_and_finite(p):
    with pytest.raises(ValueError, match="p must be positive and finite"):
        losses.build("AT", p=p)
