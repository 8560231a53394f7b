"""Several teachers as one: a configuration of each, and their joint model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from fvcore.common.config import CfgNode

from classification.data.normalize import PixelNormalize
from classification.models.registry import Classifier
from pcka.engine.config import ConfigError, flatten, merge_leaves
from pcka.teacher import Ensemble

FIRST = "members.0."  # how paths in the first teacher begin
JOINT = ("OTHERS", "SHARES", "OUTPUTS", "OUTPUTS_GB", "ACCURACY")  # keys of all together


def each_teacher(cfg: CfgNode) -> list[CfgNode]:
    """Return a configuration for each teacher, in whose TEACHER there is no other.

    What an entry of ``TEACHER.OTHERS`` does not say is as ``TEACHER`` says it, but for KWARGS,
    LOGITS and WEIGHTS, which have their defaults.

    Raises:
        ConfigError: an entry that is no mapping of keys of a teacher, NAME among them, or shares
            that do not fit.
    """
    others, shares = cfg.TEACHER.OTHERS, cfg.TEACHER.SHARES
    if not cfg.TEACHER.NAME:
        raise ConfigError("TEACHER.NAME: TEACHER.OTHERS come beside a first teacher; name it")
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
    """The first teacher's configuration with what another one says of itself."""
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
    """Return the models of :func:`each_teacher` as one that takes the first one's images.

    Its stages are the first one's.

    Args:
        cfg: with ``TEACHER.OTHERS``.
        models: of ``classification.models``, the first one with its stages.
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
    """Pixels as the first teacher has them, normalised by the statistics of another.

    ``(x - (m - m_1) / s_1) / (s / s_1)`` with ``x = (p - m_1) / s_1`` is ``(p - m) / s``.
    """
    pairs = zip(own.PIXEL_MEAN, first.PIXEL_MEAN, first.PIXEL_STD, strict=True)
    mean = [(ours - theirs) / std for ours, theirs, std in pairs]
    std = [ours / theirs for ours, theirs in zip(own.PIXEL_STD, first.PIXEL_STD, strict=True)]
    return PixelNormalize(mean, std)


def _within(path: str) -> str:
    return f"{FIRST}{path}" if path else ""
