"""The Gram of a batch of features, in the form that unbiased HSIC is a scalar product of."""

from __future__ import annotations

import torch
from torch import Tensor

from pcka.ops.reference import accumulation_dtype, without_autocast

MIN_SAMPLES = 4  # unbiased HSIC is not defined below

# Entries of the features that are centered at once, for each thread: few enough to stay in the
# cache until they are multiplied. A GPU, on which each step is a launch, takes all but the widest
# at once.
_CHUNK, _CHUNK_ON_GPU = 1 << 18, 1 << 24
_BLOCK = 64  # rows of the Gram that are one product on a CPU


def u_centered_gram(feature: Tensor) -> Tensor:
    r"""U-centered Gram of a batch (Szekely and Rizzo 2014, sec. 3): ``<K~, L~>_F`` is unbiased.

    ``K~_ij = K_ij - r_i - r_j + t`` for ``i != j`` and 0 on the diagonal, ``K = X X^T`` without its
    diagonal, ``r = K 1 / (N - 2)`` and ``t = 1'K 1 / ((N - 1) (N - 2))``.

    Args:
        feature: ``(N, ...)`` of any floating dtype, a row for each sample. It is centered before
            the product, chunk by chunk of columns: the result does not depend on the mean, and
            loses no digits to the large one that features have after a ReLU.

    Returns:
        ``(N, N)`` float64; zeros where centering leaves nothing but rounding, or ``N < 4``.
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
    """``H X X^T H`` below its diagonal, ``(N, D)`` -> ``(N, N)``: half of it is computed."""
    samples, dtype = len(rows), accumulation_dtype(rows.dtype)
    chunk, block = _CHUNK_ON_GPU, samples
    if rows.is_cpu:
        chunk, block = _CHUNK * torch.get_num_threads(), _BLOCK
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
    # Multiplied, so that what is not finite stays so.
    return gram.tril(-1) * (energy > (8 * torch.finfo(dtype).eps) ** 2 * (energy + of_mean))
