"""The Gram of a batch of features, in the form whose scalar products give unbiased HSIC."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.ops.reference import accumulation_dtype, without_autocast

MIN_SAMPLES = 4  # unbiased HSIC is not defined below

# Feature entries centered at a time, which bounds the memory. Smaller chunks would stay in a core's
# cache, but several threads would spend more time waiting for one another.
_CHUNK, _CHUNK_ON_GPU = 1 << 22, 1 << 24
_BLOCK = 64  # rows of the Gram per product on a CPU


def u_centered_gram(feature: Tensor) -> Tensor:
    r"""U-centered Gram of a batch (Szekely and Rizzo 2014, sec. 3).

    ``<K~, L~>_F / (N (N - 3))`` of two such Grams is unbiased HSIC.

    ``K~_ij = K_ij - r_i - r_j + t`` for ``i != j`` and 0 on the diagonal, ``K = X X^T`` without its
    diagonal, ``r = K 1 / (N - 2)`` and ``t = 1'K 1 / ((N - 1) (N - 2))``.

    Args:
        feature: ``(N, ...)`` of any floating dtype, one row per sample. It is centered before the
            product, in chunks of columns: the result does not depend on the mean, and loses no
            precision to the large one that features have after a ReLU.

    Returns:
        ``(N, N)`` float64; zeros if centering leaves only rounding error, or ``N < 4``.
    """
    rows = feature.detach().flatten(1)
    samples = len(rows)
    if samples < MIN_SAMPLES:
        return rows.new_zeros(samples, samples, dtype=torch.float64)
    gram = _lower_gram(rows).double()
    gram = gram + gram.T
    mean = gram.sum(0) / (samples - 2)
    gram -= mean[:, None] + mean - mean.sum() / (samples - 1)
    return gram.fill_diagonal_(0)


def _lower_gram(rows: Tensor) -> Tensor:
    """``H X X^T H`` below its diagonal, ``(N, D)`` -> ``(N, N)``; a CPU skips blocks above it."""
    samples, dtype = len(rows), accumulation_dtype(rows.dtype)
    chunk, block = (_CHUNK, _BLOCK) if rows.is_cpu else (_CHUNK_ON_GPU, samples)
    gram = rows.new_zeros(samples, samples, dtype=dtype)
    weights = gram.new_full((samples,), 1 / samples)
    of_mean = gram.new_zeros(())
    with without_autocast(rows.device):
        for columns in rows.split(max(1, chunk // samples), dim=1):
            columns = columns.to(dtype)
            mean = weights @ columns  # which is faster than columns.mean(0)
            columns = columns - mean
            of_mean += samples * mean.square().sum()
            for start in range(0, samples, block):
                end = start + block
                gram[start:end, :end].addmm_(columns[start:end], columns[:end].T)
    energy = gram.trace()
    # Multiplied, so that non-finite values stay so.
    return gram.tril(-1) * (energy > (8 * torch.finfo(dtype).eps) ** 2 * (energy + of_mean))
