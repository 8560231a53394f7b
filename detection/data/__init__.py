"""Data sets by name: detectron2's own, any in COCO's format, and the embedded digits scenes."""

from detection.data.register import register_datasets

__all__ = ["register_datasets"]
