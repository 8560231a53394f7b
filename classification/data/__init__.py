"""Image sets, resident in memory or streaming from their files, and their batches."""

from classification.data.batches import Batch, steps_per_epoch
from classification.data.build import load_evaluation_set, load_image_sets
from classification.data.image_set import ImageSet
from classification.data.normalize import PixelNormalize, pixel_statistics
from classification.data.resident import ResidentSet, crop_and_flip
from classification.data.source import Source, check_name, dataset_names, register

__all__ = [
    "Batch",
    "ImageSet",
    "PixelNormalize",
    "ResidentSet",
    "Source",
    "check_name",
    "crop_and_flip",
    "dataset_names",
    "load_evaluation_set",
    "load_image_sets",
    "pixel_statistics",
    "register",
    "steps_per_epoch",
]
