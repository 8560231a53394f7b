"""Metrics of a classifier: accuracy, alignment with a teacher, gradients of its loss terms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from classification.data import ImageSet
from classification.models import Classifier
from pcka import distributed
from pcka.analysis import CKATable, cka_matrix, layerwise_cka
from pcka.analysis.predictions import BEST, Predictions
from pcka.engine.progress import Progress
from pcka.modes import evaluation_mode

CKA_IMAGES, CKA_BATCH_SIZE = 512, 128


@torch.no_grad()
def predict(
    model: nn.Module, pixels: nn.Module, data: ImageSet, rank: int = 0, world_size: int = 1
) -> Predictions:
    """Return a model's predictions on the images ``rank``, ``rank + world_size``, … of a set.

    Runs in float32 and evaluation mode; every module's mode is restored.

    Args:
        model: (B, 3, S, S) -> logits (B, classes).
        pixels: the model's pixel normalisation.
        data: on the model's device.
        rank: of this process, if several share the images.
        world_size: number of processes.
    """
    part = {"rank": rank, "world_size": world_size}
    none = torch.zeros(0, len(data.classes), device=data.device)
    said = [Predictions.of_logits(none, data.labels[:0])]  # a process may have no image
    with Progress("evaluating", len(data)) as bar, evaluation_mode(model):
        for images, labels, _ in data.evaluation_batches(**part):
            said.append(Predictions.of_logits(model(pixels(images)), labels))
            bar.update(len(labels) * world_size)
    return Predictions.joined(said)


def accuracy(model: nn.Module, pixels: nn.Module, data: ImageSet) -> dict[str, float]:
    """Return ``{"top1": percent}``, with ``top5`` where there are more than five classes.

    Several processes share the images, and all get the result.

    Args:
        model: as for :func:`predict`.
        pixels: likewise.
        data: likewise.
    """
    hits = predict(model, pixels, data, distributed.rank(), distributed.world_size()).hits()
    distributed.sum_over_processes(hits)
    return percentages(hits, len(data), len(data.classes))


def percentages(hits: Tensor, images: int, classes: int) -> dict[str, float]:
    """Compute what :func:`accuracy` returns from :meth:`Predictions.hits`."""
    right_within = hits.cumsum(0).tolist()
    ranks = (1, BEST) if classes > BEST else (1,)
    return {f"top{rank}": 100 * right_within[rank - 1] / images for rank in ranks}


def stage_alignment(
    student: tuple[nn.Module, nn.Module],
    teacher: tuple[nn.Module, nn.Module],
    taps: Mapping[str, tuple[str, str]],
    data: ImageSet,
) -> dict[str, float]:
    """Return stage name -> minibatch CKA of both models on up to 512 images of the set.

    The images are evenly spaced in the set, so that all classes of a sorted set are among them.

    Args:
        student: pixel normalisation and model.
        teacher: pixel normalisation and model.
        taps: stage name -> (module path in the student, module path in the teacher).
        data: on the models' device.
    """
    return layerwise_cka(
        from_raw_pixels(*student),
        from_raw_pixels(*teacher),
        mixed_batches(data, CKA_IMAGES, CKA_BATCH_SIZE),
        {name: (f"model.{s}", f"model.{t}") for name, (s, t) in taps.items()},
    )


def stage_matrix(
    student: tuple[nn.Module, Classifier],
    teacher: tuple[nn.Module, Classifier],
    data: ImageSet,
) -> CKATable:
    """Return the minibatch CKA of all stages of the student with all stages of the teacher.

    Runs in one process, independently of the others.

    Args:
        student: pixel normalisation and model, which names its stages.
        teacher: likewise.
        data: as for :func:`stage_alignment`.
    """
    paths = [[f"model.{path}" for path in model.stage_names] for _, model in (student, teacher)]
    table = cka_matrix(
        from_raw_pixels(*student),
        from_raw_pixels(*teacher),
        mixed_batches(data, CKA_IMAGES, CKA_BATCH_SIZE),
        *paths,
        shared=False,
    )
    rows, columns = (tuple(f"stage{i}" for i in range(len(of_model))) for of_model in paths)
    return CKATable(table.values, rows, columns)


def gradient_figures(terms: dict[str, Tensor], student: nn.Module) -> dict[str, float]:
    """Return the entries of ``metrics.jsonl`` on each term's gradient, on this process's batch.

    Args:
        terms: ``loss_...`` -> scalar with a graph to the student.
        student: the gradients are taken with respect to its parameters.
    """
    from pcka.analysis.gradients import term_gradients  # few runs ask for it

    task = "loss_ce"  # without it cosines are left out: they would refer to another term
    found = term_gradients(
        terms, student.parameters(), task if task in terms else next(iter(terms))
    )
    return {
        f"gradient_{what}_{name.removeprefix('loss_')}": value
        for name, measured in found.items()
        for what, value in measured._asdict().items()
        if what == "share" or task in terms
    }


def is_guessing(top1: float, classes: int, images: int) -> bool:
    """Whether an accuracy (percent) on ``images`` images is hardly better than guessing."""
    chance = 100 / classes
    noise = 3 * (chance * (100 - chance) / images) ** 0.5
    return top1 < chance + noise + 0.05 * (100 - chance)


def mixed_batches(data: ImageSet, images: int, batch_size: int) -> Iterator[Tensor]:
    """Yield evenly spaced images of a set in batches (B, 3, S, S) of mixed classes.

    Args:
        data: may be sorted by class.
        images: how many, or all if there are fewer.
        batch_size: of all batches but the last, which may be smaller.
    """
    spaced = torch.linspace(0, len(data) - 1, min(images, len(data))).long()
    # Neighbours in a sorted set share a class: deal the images out, so that batches are mixed.
    batches = -(-len(spaced) // batch_size)
    chosen = torch.cat([spaced[start::batches] for start in range(batches)]).to(data.device)
    for pixels, *_ in data.subset(chosen).evaluation_batches(batch_size):
        yield pixels


def from_raw_pixels(pixels: nn.Module, model: nn.Module) -> nn.Module:
    """Return both as one module, because each model has its own pixel statistics."""
    return nn.Sequential(OrderedDict(pixels=pixels, model=model))
