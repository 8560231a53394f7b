"""Data sets by name: detectron2's own, custom ones, and the embedded digits scenes."""

from detection.data.register import register_datasets

__all__ = ["register_datasets"]
