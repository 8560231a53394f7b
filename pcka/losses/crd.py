"""CRD: recognise the teacher's embedding of a sample among others (Tian et al., ICLR 2020)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcka.losses.adapters import PooledLinear, adapt, fit, prepared
from pcka.losses.base import NO_CONTEXT, Context, Loss, Outputs, Term
from pcka.losses.checks import check_counts, check_temperature, check_weights
from pcka.ops.reference import accumulation_dtype

EPSILON = 1e-7
RANDOM_RANGE = 1 << 62  # so far above any training set's size that remainders are almost uniform


def crd_loss(scores: Tensor, normalizer: Tensor | float, samples: int) -> Tensor:
    r"""Noise-contrastive loss with one positive and ``K`` negatives for each anchor.

    ``mean_i(-log h_i0 - sum_k log(1 - h_ik))`` with ``h = P / (P + K/N)``, ``P = exp(score) / Z``
    (Tian et al. 2020, section 3.1; ``Z``, and 1e-7 added to the denominators, as in their public
    code).

    Args:
        scores: ``(B, 1 + K)``, ``<anchor, memory> / T`` of the positive, then of the negatives,
            any floating dtype.
        normalizer: ``Z``, above 0.
        samples: ``N``, the size of the training set.

    Returns:
        A scalar: float32, or float64 for float64 input.

    Raises:
        ValueError: scores that are not ``(B, 1 + K)`` with at least one negative.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        got = tuple(scores.shape)
        raise ValueError(
            f"scores must be (B, 1 + K), at least one negative for each anchor; got {got}"
        )
    noise = (scores.shape[1] - 1) / samples
    probability = scores.to(accumulation_dtype(scores.dtype)).exp() / normalizer
    # log1p, not the log of a quotient: a negative adds far less than float32 resolves near log(1).
    positive = torch.log1p((noise + EPSILON) / probability[:, 0])
    negative = torch.log1p((probability[:, 1:] + EPSILON) / noise)
    return (positive + negative.sum(1)).mean()


class _View(nn.Module):
    """One model's view of the training set: an embedding layer, and a memory of its embeddings.

    Args:
        width: width of the model's features.
        samples: ``N``, the size of the training set.
        dim: ``d``, the width of the embeddings.
        generator: draws the initial memory, uniform in ``+-sqrt(3 / d)``: rows of about unit
            length.
    """

    memory: Tensor
    normalizer: Tensor

    def __init__(self, width: int, samples: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = math.sqrt(3 / dim)
        self.embedding = PooledLinear(width, dim)
        memory = torch.empty(samples, dim).uniform_(-bound, bound, generator=generator)
        self.register_buffer("memory", memory)
        self.register_buffer("normalizer", torch.zeros(()))  # Z, 0 before the first batch

    def embed(self, feature: Tensor) -> Tensor:
        """``(B, D)`` or ``(B, D, H, W)`` -> ``(B, d)`` of unit length."""
        return F.normalize(adapt(self.embedding, feature), dim=1)

    def recognize(self, anchors: Tensor, picked: Tensor, temperature: float) -> Tensor:
        """:func:`crd_loss` of the other model's ``anchors (B, d)`` on rows ``picked (B, 1+K)``."""
        # Products with all N rows, then gathering: B * N numbers. Gathering the rows first would
        # take B * K * d, which is more for any N below K * d (two million as published).
        scores = (anchors @ self.memory.T).gather(1, picked) / temperature
        measured = scores.detach().exp().mean() * len(self.memory)
        # Only on the device: the first batch sets Z, and no batch waits for the host.
        normalizer = torch.where(self.normalizer > 0, self.normalizer, measured)
        if self.training:
            self.normalizer = normalizer
        return crd_loss(scores, normalizer, len(self.memory))

    def remember(self, indices: Tensor, embeddings: Tensor, momentum: float) -> None:
        """Move the rows ``indices (B,)`` towards ``embeddings (B, d)``."""
        # The last batch of an epoch may contain a sample twice: both write the first one's row, so
        # the order of the writes does not matter.
        first = (indices[:, None] == indices).int().argmax(1)
        rows = torch.lerp(embeddings.detach()[first], self.memory[indices], momentum)
        # A new tensor: the backward pass still needs the old one.
        self.memory = self.memory.index_copy(0, indices, F.normalize(rows, dim=1))


class _OtherClasses(nn.Module):
    """Draws samples of other classes; ``labels (N,)`` holds the class of each sample."""

    labels: Tensor
    order: Tensor
    counts: Tensor
    starts: Tensor

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        counts = labels.bincount()
        tables = {
            "labels": labels,
            "order": labels.argsort(stable=True),  # class by class
            "counts": counts,
            "starts": counts.cumsum(0) - counts,
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def draw(self, indices: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """``number`` samples of other classes for each of ``indices (B,)``: ``(B, number)``."""
        own = self.labels[indices]
        count, start = self.counts[own, None], self.starts[own, None]
        drawn = torch.randint(
            RANDOM_RANGE, (len(indices), number), generator=generator, device=indices.device
        ) % (len(self.order) - count)
        # An index among the other samples; the sample's own class is skipped in the sorted order.
        return self.order[drawn + count * (drawn >= start)]


class CRD(Loss):
    """Contrastive representation distillation: ``{"loss_crd"}``.

    Trained linear layers embed both models' features at unit length. One model's embedding of a
    sample is contrasted with the other model's embeddings of the same and of other samples, which
    memories of the whole training set hold: :func:`crd_loss` of student on teacher plus that of
    teacher on student (Tian et al. 2020, section 3.1; the positive is the sample itself, "exact" in
    their public code). ``Z`` is ``N`` times the mean of ``exp(score)`` on the first batch. After
    each step, a sample's row in a memory moves to the normalised ``m * row + (1 - m) * embedding``.

    Negatives are drawn with replacement from the other classes, so ``K`` may exceed the size of the
    training set. A draw depends on ``seed`` and the number of earlier draws, not on torch's
    generator: all processes of a run draw the same, and a resumed run continues the sequence.

    Args:
        stage: name of the tapped features; maps are averaged over their positions.
        weight: factor of the term.
        dim: ``d``, the width of the embeddings.
        negatives: ``K``, the number of negatives for each sample of the batch.
        temperature: ``T`` of the scores.
        momentum: ``m``, in [0, 1).
        seed: seed of the initial memories and of the negatives.
    """

    needs_indices = True
    needs_context = True
    relational = True
    refuses_soft_targets = (
        "CRD contrasts each image with those of other classes, but a mixed image belongs to two"
    )
    capturable = False  # counts its draws in Python, and seeds a generator for each
    others: _OtherClasses

    def __init__(
        self,
        *,
        stage: str = "pooled",
        weight: float = 0.8,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_weights(weight=weight)
        check_temperature(temperature)
        check_counts(dim=dim, negatives=negatives)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.taps = (stage,)
        self.weight = weight
        self.dim = dim
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.seed = seed
        self.draws = 0
        self.student_view: _View | None = None
        self.teacher_view: _View | None = None

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the embeddings, the memories, and the tables that negatives are drawn from.

        Raises:
            ValueError: no teacher, no ``context.train_labels``, or labels of a single class.
        """
        teacher = self.need(teacher, "teacher")
        labels = self.need(context.train_labels, "context.train_labels")
        if not (labels != labels[0]).any():
            raise ValueError(
                "context.train_labels: CRD draws negatives from other classes, but all "
                f"{len(labels)} labels are equal; train on two classes or more"
            )
        generator = self._generator(torch.device("cpu"))
        self.student_view, self.teacher_view = (
            fit(_View(feature.shape[1], len(labels), self.dim, generator), feature)
            for feature in (student.feature(self.taps[0]), teacher.feature(self.taps[0]))
        )
        self.others = _OtherClasses(labels).to(student.feature(self.taps[0]).device)

    def terms(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Term]:
        """The single term; in training, the batch updates the memories."""
        teacher = self.need(teacher, "teacher")
        indices = self.need(student.indices, "student.indices")
        by_student = prepared(self.student_view, "CRD")
        by_teacher = prepared(self.teacher_view, "CRD")
        # Half precision would change exp(score) by several per cent.
        with torch.autocast(indices.device.type, enabled=False):
            v_s = by_student.embed(student.feature(self.taps[0]))
            v_t = by_teacher.embed(teacher.feature(self.taps[0]).detach())
            _check_indices(indices, len(v_s))
            picked = torch.cat([indices[:, None], self._draw(indices)], dim=1)
            loss = by_teacher.recognize(v_s, picked, self.temperature)
            loss = loss + by_student.recognize(v_t, picked, self.temperature)
            if self.training:
                by_student.remember(indices, v_s, self.momentum)
                by_teacher.remember(indices, v_t, self.momentum)
        return {f"loss_{self.log_name}": Term(self.weight, loss)}

    def get_extra_state(self) -> Tensor:
        """The number of draws so far; not a buffer, which the host would have to wait for."""
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue after that many draws."""
        self.draws = int(state)

    def _draw(self, indices: Tensor) -> Tensor:
        if self.training:
            self.draws += 1
        return self.others.draw(indices, self.negatives, self._generator(indices.device))

    def _generator(self, device: torch.device) -> torch.Generator:
        """The current draw's generator; the sequence maps adjacent numbers to unrelated seeds."""
        sequence = np.random.SeedSequence((self.seed, self.draws))
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1)[0]))


def _check_indices(indices: Tensor, samples: int) -> None:
    if indices.shape != (samples,) or indices.dtype != torch.int64:
        raise ValueError(
            f"student.indices must hold the position of each of the {samples} samples in the "
            f"training set, (B,) int64; got {tuple(indices.shape)} {indices.dtype}"
        )
