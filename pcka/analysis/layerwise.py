"""Similarity of the layers of two models, over a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pcka.analysis.cka_table import CKATable
from pcka.analysis.grams import MIN_SAMPLES, u_centered_gram
from pcka.analysis.layers import select_layers
from pcka.distributed import from_first_process, sum_over_processes
from pcka.modes import evaluation_mode
from pcka.taps import FeatureTap

Grams = Mapping[str, Tensor]


class MinibatchCKA:
    r"""CKA between all layers of one model and all of another: the ratio of sums over batches.

    ``sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) * sum_b HSIC_1(L_b, L_b))`` over
    batches ``b``, with ``HSIC_1`` the unbiased estimate (Song et al. 2012, eq. 5) of the Gram
    matrices of a batch (Nguyen, Raghu and Kornblith 2021, eq. 4). The sums are unbiased whatever
    the batch size, so the result does not rise with small batches of wide features, as plain CKA
    does. It may be slightly negative for unrelated layers.

    ``HSIC_1(K, L) = <K~, L~>_F / (N (N - 3))`` with U-centered Grams (Szekely and Rizzo 2014), so
    one product serves all pairs of layers, ``(L_a, N*N) @ (N*N, L_b)``.

    Args:
        layers_a: names of the rows.
        layers_b: names of the columns.

    Raises:
        ValueError: a model has no layers.
    """

    def __init__(self, layers_a: Iterable[str], layers_b: Iterable[str]) -> None:
        self._layers = tuple(layers_a), tuple(layers_b)
        if not all(self._layers):
            raise ValueError("layers: expected one or more of each model, got none")
        rows, columns = map(len, self._layers)
        # Sums between the layers, sums of each with itself, and the number of batches: in one
        # tensor, so that processes add up all of it at once.
        self._sizes = rows * columns, rows, columns, 1
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.float64)

    def update(self, a: Grams, b: Grams) -> None:
        """Add one batch; a batch of fewer than 4 samples is skipped.

        Args:
            a: layer -> ``(N, N)`` by :func:`u_centered_gram`.
            b: likewise, of the same samples.

        Raises:
            ValueError: a layer's features are not of these samples.
        """
        stacked = [
            [(name, grams[name]) for name in layers] for grams, layers in zip((a, b), self._layers)
        ]
        samples = len(next(iter(chain(*stacked)))[1])
        for name, gram in chain(*stacked):
            if len(gram) != samples:
                raise ValueError(
                    f"layer {name!r}: expected features (B, ...) of the same {samples} samples as "
                    f"the other layers, got {len(gram)} rows; leave this layer out"
                )
        if samples < MIN_SAMPLES:
            return
        k, l = (torch.stack([gram for _, gram in side]).flatten(1) for side in stacked)
        one = k.new_full((1,), samples * (samples - 3))
        parts = (k @ l.T).flatten(), k.square().sum(1), l.square().sum(1), one
        self._sums = self._sums.to(k.device) + torch.cat(parts) / one

    def sum_over_processes(self) -> None:
        """Sum over all processes; every process must call this."""
        sum_over_processes(self._sums)

    def compute(self) -> CKATable:
        """CKA over all batches so far: 0 if a layer is constant, NaN if one is not finite.

        Raises:
            ValueError: no batch of at least 4 samples was added.
        """
        cross, of_a, of_b, batches = self._sums.cpu().split(self._sizes)
        if not batches:
            raise ValueError(f"no batch of at least {MIN_SAMPLES} samples was given")
        # The estimate of a self-similarity may be negative: nothing to compare with.
        scale = of_a.clamp(min=0).sqrt()[:, None] * of_b.clamp(min=0).sqrt()
        cross = cross.view_as(scale)
        values = torch.where(scale == 0, cross * 0, cross / scale)
        return CKATable(values, *self._layers)


@torch.no_grad()
def cka_matrix(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Any],
    layers_a: str | Sequence[str] | None = None,
    layers_b: str | Sequence[str] | None = None,
    *,
    shared: bool = True,
) -> CKATable:
    """Minibatch CKA between all layers of two models; see :class:`MinibatchCKA`.

    One pass over the data: a layer's Gram is computed as the layer runs, and its features are not
    kept. Both models run in eval mode without gradients, and their modes are restored. A model may
    be compared with itself. With several processes, each passes its own part of the data (the first
    one at least one batch), and all get the table for the whole.

    Args:
        model_a: images ``(B, C, H, W)``, or another tensor with samples first -> anything.
        model_b: likewise, on the same device.
        batches: the models' inputs, or tuples and lists that begin with them, as from data loaders.
        layers_a: the rows: module paths as :class:`pcka.FeatureTap` takes them, or patterns such as
            ``"layer*.conv1"``; None: every layer that :func:`pcka.analysis.find_layers` finds.
        layers_b: the columns, likewise.
        shared: all processes measure together; False: each on its own, without waiting for the
            others.

    Raises:
        ValueError: a model lacks a path, a pattern matches no layer, a layer does not return one
            row per sample, or there is no batch of at least 4 samples.
    """
    models = {"a": model_a, "b": model_b}
    device = next(chain(model_a.parameters(), model_b.parameters()), torch.empty(0)).device
    inputs = (_input_of(batch).to(device) for batch in batches)
    with evaluation_mode(*models.values()):
        first = next((images for images in inputs if len(images) >= MIN_SAMPLES), None)
        chosen = None
        if first is not None:
            wanted = layers_a, layers_b
            chosen = [select_layers(*of, first) for of in zip(models.values(), wanted)]
        # One list for all processes, some of which may have no batch.
        chosen = from_first_process(chosen) if shared else chosen
        if chosen is None:
            raise ValueError(f"batches: expected one of at least {MIN_SAMPLES} samples, got none")
        result = MinibatchCKA(*chosen)
        grams = _gram_runner(model_a, model_b, *chosen)
        for images in () if first is None else chain([first], inputs):
            result.update(*grams(images))
    if shared:
        result.sum_over_processes()
    return result.compute()


@torch.no_grad()
def layerwise_cka(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    taps: Mapping[str, str | tuple[str, str]],
) -> dict[str, float]:
    """Minibatch CKA of tapped layers of two models over a data set; see :class:`MinibatchCKA`.

    Both models run in eval mode without gradients, and their modes are restored. Processes do not
    wait for one another: each gets the values of its own batches.

    Args:
        student: images -> anything.
        teacher: images -> anything.
        batches: images ``(B, C, H, W)``, on the models' device.
        taps: layer name -> (module path in the student, module path in the teacher), or one path
            for both.

    Returns:
        layer name -> CKA.

    Raises:
        ValueError: a model lacks a path, or there is no batch of at least 4 samples.
    """
    pairs = [(pair, pair) if isinstance(pair, str) else pair for pair in taps.values()]
    layers = [[pair[side] for pair in pairs] for side in (0, 1)]
    result = MinibatchCKA(*layers)
    grams = _gram_runner(student, teacher, *layers)
    with evaluation_mode(student, teacher):
        for images in batches:
            result.update(*grams(images))
    return dict(zip(taps, result.compute().values.diagonal().tolist()))


def _gram_runner(
    model_a: nn.Module, model_b: nn.Module, layers_a: Iterable[str], layers_b: Iterable[str]
) -> Callable[[Tensor], tuple[Grams, Grams]]:
    """Return a function that runs both models on images and returns the Grams of both by layer."""
    paths: dict[nn.Module, dict[str, str]] = {}
    for model, layers in ((model_a, layers_a), (model_b, layers_b)):
        paths.setdefault(model, {}).update(dict(zip(layers, layers)))

    def run(images: Tensor) -> tuple[Grams, Grams]:
        kept = {}
        for model, of_model in paths.items():  # a model on both sides runs once
            # Only now, because one model may be a part of the other.
            with FeatureTap(model, of_model, keep=u_centered_gram) as tap:
                model(images)
                kept[model] = tap.pop()
        return kept[model_a], kept[model_b]

    return run


def _input_of(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, Tensor):
        raise ValueError(
            "batches: expected tensors, or tuples and lists that begin with one; got "
            f"{type(batch).__name__}"
        )
    return first
