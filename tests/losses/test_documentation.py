from __future__ import annotations

from pcka.losses import Loss, described
from pcka.losses.documentation import keywords, summary


def other_loss(*, power):
    """The function.

    Args:
        power: of the difference,
            above 0.

    Returns:
        A scalar.
    """


class Mine(Loss):
    """The first line.

    Of :func:`other_loss`.

    Args:
        weight: factor of ``loss_mine``.
        power, unknown: of :func:`other_loss`.
    """

    def __init__(self, *, weight=1.0, power=2.0, unknown=0, silent=0):
        super().__init__()


def test_a_keyword_is_what_the_class_or_else_the_function_says():
    assert keywords(Mine) == {
        "weight": "factor of loss_mine",
        "power": "of the difference, above 0",
        "unknown": "",
        "silent": "",
    }
    assert summary(Mine) == "The first line"


def test_of_a_method_its_paper_is_named():
    about, texts = described("RKD")
    assert about.endswith("(Park et al., CVPR 2019)")
    assert texts["distance_weight"] == "w_d, factor of the distances' part"
