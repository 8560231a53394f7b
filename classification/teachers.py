"""Several teachers as one: a configuration for each, and their joint model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from fvcore.common.config import CfgNode

from classification.data.normalize import PixelNormalize
from classification.models.registry import Classifier
from pcka.engine.config import ConfigError, flatten, merge_leaves
from pcka.teacher import Ensemble

FIRST = "members.0."  # prefix of paths in the first teacher
JOINT = ("OTHERS", "SHARES", "OUTPUTS", "OUTPUTS_GB", "ACCURACY")  # keys of all teachers together


def each_teacher(cfg: CfgNode) -> list[CfgNode]:
    """Return one configuration per teacher, each with that teacher alone.

    Keys missing in an entry of ``TEACHER.OTHERS`` are as in ``TEACHER``, except for KWARGS, LOGITS
    and WEIGHTS, which take their defaults.

    Raises:
        ConfigError: no first teacher, an entry that is not a mapping of teacher keys including
            NAME, or shares that do not fit.
    """
    others, shares = cfg.TEACHER.OTHERS, cfg.TEACHER.SHARES
    if not cfg.TEACHER.NAME:
        raise ConfigError("TEACHER.NAME: TEACHER.OTHERS need a first teacher; name it")
    if shares and (len(shares) != 1 + len(others) or not all(map(_is_share, shares))):
        raise ConfigError(
            f"TEACHER.SHARES: expected {1 + len(others)} numbers above 0, one for each teacher, or "
            f"none, got {shares}"
        )
    first = _alone(cfg)
    return [first, *(_other(first, f"TEACHER.OTHERS[{i}]", own) for i, own in enumerate(others))]


def _is_share(share: object) -> bool:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    return is_number and 0 < share < float("inf")  # type: ignore[operator]


def _alone(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    for key in JOINT:
        cfg.TEACHER.pop(key)
    cfg.freeze()
    return cfg


def _other(first: CfgNode, source: str, entry: object) -> CfgNode:
    """Return the first teacher's configuration, overridden by the entry of another one."""
    if not isinstance(entry, Mapping) or not entry.get("NAME"):
        raise ConfigError(
            f"{source}: expected keys of a teacher, as in {{NAME: resnet56, WEIGHTS: file}}, got "
            f"{entry!r}"
        )
    cfg = first.clone()
    cfg.defrost()
    cfg.TEACHER.KWARGS, cfg.TEACHER.LOGITS, cfg.TEACHER.WEIGHTS = CfgNode(), "", ""
    merge_leaves(cfg.TEACHER, flatten(entry), source)
    cfg.freeze()
    return cfg


def joined(cfg: CfgNode, models: Sequence[Classifier]) -> Classifier:
    """Return the models of :func:`each_teacher` as one that takes the first one's inputs.

    Its stages are the first one's.

    Args:
        cfg: with ``TEACHER.OTHERS``.
        models: from ``classification.models``, the first one with its stages.
    """
    sections = [one.TEACHER for one in each_teacher(cfg)]
    inputs = [_from_first(sections[0], section) for section in sections]
    ensemble = cast(Classifier, Ensemble(models, cfg.TEACHER.SHARES or None, inputs=inputs))
    for attribute in Classifier.__annotations__:
        value = getattr(models[0], attribute)
        paths = _within(value) if isinstance(value, str) else tuple(map(_within, value))
        setattr(ensemble, attribute, paths)
    return ensemble


def _from_first(first: CfgNode, own: CfgNode) -> PixelNormalize:
    """Return the map from the first teacher's normalised pixels to those of another.

    ``(x - (m - m_1) / s_1) / (s / s_1)`` with ``x = (p - m_1) / s_1`` is ``(p - m) / s``.
    """
    pairs = zip(own.PIXEL_MEAN, first.PIXEL_MEAN, first.PIXEL_STD, strict=True)
    mean = [(ours - theirs) / std for ours, theirs, std in pairs]
    std = [ours / theirs for ours, theirs in zip(own.PIXEL_STD, first.PIXEL_STD, strict=True)]
    return PixelNormalize(mean, std)


def _within(path: str) -> str:
    return f"{FIRST}{path}" if path else ""
