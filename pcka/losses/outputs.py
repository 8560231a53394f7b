"""What losses read: the outputs of a model on one batch, and what is fixed for a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """The logits and the tapped features of one model on one batch.

    Args:
        logits: ``(B, P)`` class scores before the softmax, or None where no loss needs them.
        features: tap name -> ``(B, C, H, W)`` or ``(B, D)``.
        indices: position of each sample in the training set, ``(B,)`` int64, or None where no loss
            needs it.
    """

    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Tensor | None = None

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


@dataclass(frozen=True)
class Context:
    """What a loss may need to know of the run beyond the outputs on a batch.

    Args:
        train_labels: class of each training image, ``(N,)`` int64.
        teacher_classifier: the teacher's last layer, pooled features ``(B, D_t)`` -> logits.
        teacher_norms: tap name -> weight and bias, ``(C_t,)`` each, of the batch norm that gives
            that feature of the teacher, for taps of features before their activation.
    """

    train_labels: Tensor | None = None
    teacher_classifier: nn.Module | None = None
    teacher_norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
