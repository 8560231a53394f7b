"""What runs with several seeds say: mean and spread, and which differences are more than noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from scipy.stats import t as student_t

CONFIDENCE = 0.95


def mean_and_deviation(values: Collection[float], *, signed: bool = False) -> str:
    """``mean ± sample standard deviation``; of one value no deviation is known.

    ``nan`` where one of them is, as COCO's figures are of a model that finds nothing.
    """
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def paired_differences(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``own - other`` of the seeds that both have."""
    return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def verdict(pairs: Sequence[float]) -> str:
    """``above``, ``below``, or ``none`` where the interval of the mean difference holds 0.

    The interval is that of the paired t test at :data:`CONFIDENCE`. ``unknown`` where a value is
    not a number.
    """
    if any(map(math.isnan, pairs)):
        return "unknown (nan)"
    if len(pairs) < 2:
        return "unknown (one seed)" if pairs else ""
    margin = student_t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)
    margin *= statistics.stdev(pairs) / len(pairs) ** 0.5
    mean = statistics.fmean(pairs)
    if abs(mean) <= margin:
        return "none"
    return "above" if mean > 0 else "below"
