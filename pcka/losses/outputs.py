"""What a model gave for one batch: the input of every loss module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """The logits and the tapped features of one model on one batch.

    Args:
        logits: ``(B, P)`` class scores before the softmax, or None where no loss needs them.
        features: tap name -> ``(B, C, H, W)`` or ``(B, D)``.
    """

    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def feature(self, name: str) -> Tensor:
        """The feature tapped under ``name``.

        Raises:
            ValueError: there is none; the message lists what there is.
        """
        if name not in self.features:
            raise ValueError(
                f"feature {name!r} is not among the tapped features "
                f"{sorted(self.features)}; add a tap of that name, or name one of these"
            )
        return self.features[name]
