"""What a run tries on a few training images before it starts."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from classification.data import ImageSet, pixel_statistics
from classification.data.batches import mixes
from pcka import losses
from pcka.distiller import Distiller
from pcka.engine.config import ConfigError
from pcka.engine.preflight import check_teaching, naming, try_losses
from pcka.modes import evaluation_mode

TRIED_IMAGES = 16  # on which losses and teacher are tried


def tried_inputs(
    cfg: CfgNode, train_set: ImageSet, images: int = TRIED_IMAGES
) -> dict[str, Tensor]:
    """Return a distiller's keywords for evenly spaced training images, without augmentation.

    Args:
        cfg: ``DATA`` and both models' pixel statistics are read.
        train_set: the training images.
        images: how many at most.
    """
    count = min(images, TRIED_IMAGES, len(train_set))
    spaced = torch.linspace(0, len(train_set) - 1, count).long()
    pixels, labels, _ = next(train_set.subset(spaced).evaluation_batches())
    if mixes(cfg.DATA):
        from classification.data.mixing import soft_targets  # few runs mix images

        labels = soft_targets(labels, len(train_set.classes))
    own, for_teacher = (
        pixel_statistics(role).to(pixels.device)(pixels) for role in (cfg.STUDENT, cfg.TEACHER)
    )
    indices = spaced.to(pixels.device)
    return {"images": own, "target": labels, "teacher_images": for_teacher, "indices": indices}


@torch.no_grad()
def check_logits(model: nn.Module, role: str, cfg: CfgNode, classes: int) -> None:
    """Refuse a model that does not return one logit for each class of the data.

    Args:
        model: on the training device; it stays unchanged.
        role: "student" or "teacher".
        cfg: whose section of that role names the model.
        classes: number of classes of the data.

    Raises:
        ConfigError: the message says what it returns.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(2, 3, cfg.DATA.IMAGE_SIZE, cfg.DATA.IMAGE_SIZE, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluation_mode(model):
        logits = model(images)
    returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if returned != (2, classes):
        key = role.upper()
        raise ConfigError(
            f"{key}.NAME: {cfg[key].NAME} returns {returned} for 2 images, expected logits "
            f"{(2, classes)}, because the data has {classes} classes; let your model take "
            "num_classes, or give it as many outputs"
        )


def prepare_distiller(
    cfg: CfgNode, distiller: Distiller, context: losses.Context, train_set: ImageSet
) -> None:
    """Size the adapters by a few training images; try teacher and losses on them.

    Raises:
        ConfigError: a loss cannot compare what it taps, or the teacher has nothing to teach.
    """
    given = tried_inputs(cfg, train_set)
    for_teacher = given["teacher_images"]
    with naming("DISTILL"):
        distiller.prepare(given["images"][:2], for_teacher[:2], context)
    assert distiller.teacher is not None
    said = distiller.observe_teacher(for_teacher[:2]) if cfg.TEACHER.OUTPUTS else None
    if said is not None:
        from classification.teacher_outputs import check_size  # few runs keep any

        check_size(cfg, distiller, said, len(train_set))
    logits = any(loss.needs_logits and loss.needs_teacher for loss in distiller.losses)
    check_teaching(distiller.teacher, distiller.teacher_paths, for_teacher, logits=logits)
    if not cfg.COMPILE:  # otherwise the first step tries the losses: compiling takes minutes
        with torch.no_grad():
            try_losses(distiller, **given)
