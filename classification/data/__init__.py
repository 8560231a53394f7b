"""Image sets, resident in memory or streaming from their files, and their batches."""

from classification.data.augment import crop_and_flip
from classification.data.batches import Batch, steps_per_epoch
from classification.data.build import load_evaluation_set, load_image_sets
from classification.data.image_set import ImageSet
from classification.data.normalize import PixelNormalize
from classification.data.resident import ResidentSet
from classification.data.streaming import StreamingSet

__all__ = [
    "Batch",
    "ImageSet",
    "PixelNormalize",
    "ResidentSet",
    "StreamingSet",
    "crop_and_flip",
    "load_evaluation_set",
    "load_image_sets",
    "steps_per_epoch",
]
