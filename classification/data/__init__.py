"""Image sets that are resident as one uint8 tensor, and their batches."""

from classification.data.augment import crop_and_flip
from classification.data.batches import training_batches
from classification.data.build import load_evaluation_set, load_image_sets
from classification.data.image_set import ImageSet
from classification.data.normalize import PixelNormalize

__all__ = [
    "ImageSet",
    "PixelNormalize",
    "crop_and_flip",
    "load_evaluation_set",
    "load_image_sets",
    "training_batches",
]
