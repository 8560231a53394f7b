"""The section ``DISTILL`` of a configuration, and the losses that it describes, for both tasks.

``DISTILL.METHODS`` names the losses that are summed; ``DISTILL.<NAME>`` holds the keyword arguments
of the loss ``<NAME>`` in upper case. A value is taken, in increasing order of precedence, from the
loss's own default, the trainer's default, the configuration and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from pcka import losses
from pcka.engine.config import (
    PER_STAGE,
    ConfigError,
    flatten,
    import_modules,
    merge_leaves,
    near_names,
)

# Allowed in STAGES besides names of taps: all numbered stages except the stem.
WILDCARDS = {"all": "", "all_preact": "_preact"}


class UntappedError(ConfigError):
    """A loss names stages that are not tapped."""


def check_methods(methods: Sequence[str]) -> None:
    """Refuse unknown and repeated loss names.

    Raises:
        ConfigError: an unknown name (close matches are suggested), or a repeated one.
    """
    if len(set(methods)) != len(methods):
        raise ConfigError(f"DISTILL.METHODS: expected each loss once, got {list(methods)}")
    for name in methods:
        if name not in losses.names():
            raise ConfigError(
                f"DISTILL.METHODS: unknown loss {name!r}; {near_names(name, losses.names())}"
            )


def section_defaults(name: str) -> dict[str, object]:
    """Key -> default value, for the section of a loss."""
    return {
        key.upper(): _as_setting(key.upper(), value) for key, value in losses.defaults(name).items()
    }


def add_sections(
    distill: CfgNode,
    names: Iterable[str],
    defaults: Callable[[str], Mapping[str, object]] = section_defaults,
) -> None:
    """Add the sections of some losses to ``DISTILL``; existing ones are left unchanged.

    Args:
        distill: the section; those added to it have its type.
        names: of registered losses.
        defaults: name -> section; a trainer may have its own defaults.
    """
    for name in names:
        if name not in distill:
            distill[name] = type(distill)(dict(defaults(name)))


def merge_settings(
    cfg: CfgNode,
    leaves: Mapping[str, object],
    source: str,
    defaults: Callable[[str], Mapping[str, object]] = section_defaults,
) -> None:
    """Apply :func:`pcka.engine.config.merge_leaves`, adding the sections of the named losses.

    A loss gets a section by being named, in ``DISTILL.METHODS`` or by one of its own settings. The
    modules in ``IMPORTS`` are imported first, for what they register; those of all sources add up.

    Args:
        cfg: the whole configuration.
        leaves: dotted key -> value.
        source: where the values come from, for messages.
        defaults: as for :func:`add_sections`.

    Raises:
        ConfigError: an unknown key (close matches are named), a value of the wrong type, or a
            module that cannot be imported.
    """
    if "IMPORTS" in leaves:
        before = cfg.IMPORTS
        merge_leaves(cfg, {"IMPORTS": leaves["IMPORTS"]}, source)
        cfg.IMPORTS = list(dict.fromkeys([*before, *cfg.IMPORTS]))
        import_modules(cfg.IMPORTS, "IMPORTS")
    settings = {key: value for key, value in leaves.items() if key != "IMPORTS"}
    add_sections(cfg.DISTILL, named_losses(settings), defaults)

    def settings_of_all() -> Iterable[str]:
        return flatten({name: defaults(name) for name in losses.names()}, "DISTILL.")

    merge_leaves(cfg, settings, source, settings_of_all)
    add_sections(cfg.DISTILL, [n for n in cfg.DISTILL.METHODS if n in losses.names()], defaults)


def named_losses(keys: Iterable[str]) -> list[str]:
    """The losses with settings among dotted keys, such as ``DISTILL.KD.WEIGHT``."""
    sections = [key.split(".")[1] for key in keys if key.startswith("DISTILL.") and key.count(".")]
    return [name for name in dict.fromkeys(sections) if name in losses.names()]


def changed_settings(had: CfgNode, wanted: CfgNode) -> dict[str, tuple[object, object]]:
    """Settings that differ: dotted key -> (value in ``had``, value in ``wanted``).

    Values are compared as stored in YAML: a tuple equals a list, and a single value for all stages
    equals a list of that value. A key that ``had`` lacks is None there. Settings of losses that
    ``had`` does not use are ignored: if ``wanted`` uses them, ``DISTILL.METHODS`` differs.
    """
    before, after = (flatten(yaml.safe_load(cfg.dump())) for cfg in (had, wanted))
    return {
        key: (before.get(key), value)
        for key, value in after.items()
        if all(name in had.DISTILL.METHODS for name in named_losses([key]))
        and not _same_setting(key, before.get(key), value)
    }


def _same_setting(key: str, value: object, other: object) -> bool:
    if key.rpartition(".")[2] not in PER_STAGE:
        return value == other
    return _merged(value) == _merged(other)


def build_losses(
    methods: Sequence[str],
    sections: Mapping[str, Mapping[str, Any]],
    taps: Collection[str],
    *,
    default_stages: Sequence[str] = (),
    unfit: Callable[[losses.Loss], str | None] = lambda _: None,
    taps_key: str = "DISTILL.TAPS",
) -> list[losses.Loss]:
    """Return the losses of ``DISTILL.METHODS``, each built from the settings in its section.

    ``STAGES`` holds names of taps; ``all`` and ``all_preact`` stand for ``stage1``, ``stage2``, …
    and ``stage1_preact``, …; an empty list stands for ``default_stages``. A per-stage setting may
    hold a single value, which then applies to all stages.

    Args:
        methods: names of losses.
        sections: the section ``DISTILL``; a loss without a section in it uses its own defaults.
        taps: names of the taps.
        default_stages: what an empty ``STAGES`` stands for; () to refuse it.
        unfit: loss -> why it cannot be used here, or None.
        taps_key: the key that adds taps, for messages.

    Raises:
        ConfigError: an unknown loss, values that a loss rejects, or an unfit loss.
        UntappedError: stages that are not tapped.
    """
    check_methods(methods)
    built = []
    for name in methods:
        keywords = {key.lower(): _as_keyword(v) for key, v in sections.get(name, {}).items()}
        if "stages" in keywords:
            keywords = _with_stages(name, keywords, taps, default_stages, taps_key)
        try:
            loss = losses.build(name, **keywords)
        except ValueError as error:
            # A wrong stage name also makes the number of settings wrong: report the name.
            _check_tapped(name, keywords.get("stages", ()), taps, taps_key)
            raise ConfigError(f"DISTILL.{name}: {error}") from error
        if reason := unfit(loss):
            raise ConfigError(f"DISTILL.METHODS: {name} {reason}")
        _check_tapped(name, loss.taps, taps, taps_key)
        built.append(loss)
    return built


def too_few_images(loss: losses.Loss, images: int, key: str) -> str | None:
    """Return why a loss cannot compare so few images, which ``key`` sets; None if it can."""
    if images >= loss.least_samples:
        return None
    return (
        f"compares at least {loss.least_samples} images at a time, but {key} gives it {images}; "
        "set a larger one, or other settings of the loss"
    )


def numbered_stages(taps: Iterable[str]) -> list[str]:
    """Only the taps ``stage0``, ``stage1``, …"""
    return [name for name in taps if name.startswith("stage") and name[5:].isdigit()]


def _with_stages(
    name: str,
    keywords: Mapping[str, Any],
    taps: Collection[str],
    default_stages: Sequence[str],
    taps_key: str,
) -> dict[str, Any]:
    """The keyword arguments with wildcards expanded and single values repeated for all stages."""
    numbered = [stage for stage in numbered_stages(taps) if stage != "stage0"]
    stages: list[str] = []
    for stage in keywords["stages"] or default_stages:
        if stage not in WILDCARDS:
            stages.append(stage)
        elif numbered:
            stages += [found + WILDCARDS[stage] for found in numbered]
        else:
            there = ", ".join(taps) or "none"
            raise UntappedError(
                f"DISTILL.{name}.STAGES: {stage!r} stands for all numbered stages but the stem, "
                f"and there are none; available: {there}; add them in {taps_key}"
            )
    if not stages:
        raise ConfigError(
            f"DISTILL.{name}.STAGES: expected one or more stages, got none: the loss has no term"
        )
    single = {
        key: value * len(stages)
        for key, value in keywords.items()
        if key.upper() in PER_STAGE and isinstance(value, tuple) and len(value) == 1
    }
    return {**keywords, **single, "stages": tuple(stages)}


def _check_tapped(name: str, stages: Sequence[str], taps: Collection[str], taps_key: str) -> None:
    if missing := [str(stage) for stage in stages if stage not in taps]:
        raise UntappedError(
            f"DISTILL.{name}: {', '.join(missing)} is not tapped; available: "
            f"{', '.join(taps) or 'none'}; add more in {taps_key}"
        )


def _as_setting(key: str, default: object) -> object:
    """A keyword argument's default as stored in the configuration."""
    if isinstance(default, tuple):
        return list(default)
    return [default] if key in PER_STAGE and not isinstance(default, list) else default


def _as_keyword(value: object) -> Any:
    return tuple(map(_as_keyword, value)) if isinstance(value, list | tuple) else value


def _merged(value: object) -> object:
    """A per-stage list, reduced to a single item if all of its items are equal."""
    if not isinstance(value, list | tuple):
        return [value]
    distinct = [item for item, _ in groupby(value)]
    return distinct if len(distinct) == 1 else list(value)
