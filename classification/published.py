"""The figures of the paper, for the settings that are the paper's."""

from __future__ import annotations

from fvcore.common.config import CfgNode

# Zhou et al., IJCAI 2024, tables 1 and 2: CIFAR-100 top-1 (%) after 240 epochs, teacher -> student.
PAIRS = (
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("wrn_40_2", "wrn_40_1"),
    ("wrn_40_2", "wrn_16_2"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("wrn_40_2", "ShuffleV1"),
    ("resnet32x4", "ShuffleV1"),
    ("vgg13", "MobileNetV2"),
)
CIFAR100_TOP1: dict[str, tuple[float | None, ...]] = {
    "ce": (69.06, 71.14, 71.98, 73.26, 72.5, 70.36, 70.5, 70.5, 64.6),
    "fitnet": (68.99, 71.06, 72.24, 73.58, 73.5, 71.02, 73.73, 73.59, 64.14),
    "at": (70.22, 70.55, 72.77, 74.08, 73.44, 71.43, 73.32, 72.73, 59.4),
    "sp": (70.04, 72.69, 72.43, 73.83, 72.94, 72.68, 74.52, 73.48, 66.3),
    "cc": (69.48, 71.48, 72.21, 73.56, 72.97, 70.71, 71.38, 71.14, 64.86),
    "rkd": (69.25, 71.82, 72.22, 73.35, 71.9, 71.48, 72.21, 72.28, 64.52),
    "vid": (70.16, 70.38, 73.3, 74.11, 73.09, 71.23, 73.61, 73.38, 65.56),
    "crd": (71.46, 73.48, 74.14, 75.48, 75.51, 73.94, 76.05, 75.11, 69.73),
    "ofd": (None, 73.23, 74.33, 75.24, 74.95, 73.95, 75.85, 75.98, 69.48),
    "reviewkd": (None, 71.89, 75.09, 76.12, 75.63, 74.84, 77.14, 76.93, 70.37),
    "ickd": (71.91, 74.11, 74.63, 75.57, 75.48, 73.88, 75.19, 74.34, 67.55),
    "fcka": (71.49, 73.64, 74.7, 75.53, 74.93, 74.35, 75.98, 75.67, 68.97),
    "kd": (70.67, 73.08, 73.54, 74.92, 73.33, 72.98, 74.83, 74.07, 67.37),
    "dkd": (None, 74.11, 74.81, 76.24, 76.32, 74.68, 76.7, 76.45, 69.71),
    "dist": (69.94, 73.55, 74.42, 75.29, 75.79, 73.74, 75.23, 75.23, 68.48),
    "ikl": (None, 74.26, 74.98, 76.45, 76.59, 74.88, 77.19, 76.64, 70.4),
    "nkd": (71.26, 73.79, 75.23, 76.37, 76.35, 74.86, 76.59, 76.9, 70.22),
    "lcka": (70.87, 73.64, 74.63, 75.78, 75.12, 74.35, 76.12, 76.43, 69.37),
    "srrl": (71.51, 73.8, 74.75, 75.96, 75.92, 74.4, 76.61, 75.66, 69.14),
    "rcka": (72.26, 74.31, 75.34, 76.51, 76.11, 74.97, 77.21, 76.97, 70.12),
}
RECIPE_EPOCHS, RECIPE_BATCH = 240, 64


def published_accuracy(cfg: CfgNode, method: str) -> float | None:
    """Return the paper's top-1 accuracy (%) of a method, or None where it has none.

    Args:
        cfg: the setting; the paper's is one of :data:`PAIRS` on all of CIFAR-100, for 240 epochs
            of batch 64.
        method: name of a method file.
    """
    pair = (cfg.TEACHER.NAME, cfg.STUDENT.NAME)
    whole = not (cfg.DATA.TRAIN_IMAGES or cfg.DATA.HOLDOUT)
    recipe = (cfg.SOLVER.EPOCHS, cfg.SOLVER.BATCH_SIZE) == (RECIPE_EPOCHS, RECIPE_BATCH)
    if cfg.DATA.NAME != "cifar100" or not whole or not recipe or pair not in PAIRS:
        return None
    return CIFAR100_TOP1[method][PAIRS.index(pair)] if method in CIFAR100_TOP1 else None
