"""From an entry of a data set to what a model takes; what cannot be read is named."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper

from pcka.engine.config import ConfigError


class UnusableImageError(ConfigError):
    """An image, or its annotations, that cannot be used; the message names the file."""


class NamingMapper(DatasetMapper):
    """detectron2's mapper, whose errors say which image they are about.

    Raises:
        UnusableImageError: a file that is missing or broken, an image of another size than the
            annotations say or too large to be opened, annotations that cannot be read.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except Exception as error:  # of image libraries, NumPy and assertions alike
            raise UnusableImageError(
                f"{dataset_dict.get('file_name')}: the image or its annotations cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error
