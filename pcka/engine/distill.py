"""The section ``DISTILL`` of a configuration, and the losses that it describes, for both tasks.

``DISTILL.METHODS`` names the losses that are summed; ``DISTILL.<NAME>`` holds the keywords of the
loss ``<NAME>`` in upper case. A key's value is, from weakest to strongest, the loss's own default,
the trainer's default, the configuration's and the command line's.
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

# What STAGES may hold beside names of taps: all numbered stages but the stem.
WILDCARDS = {"all": "", "all_preact": "_preact"}


class UntappedError(ConfigError):
    """A loss names stages that are not tapped."""


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a name that no loss has, and a loss that is named twice.

    Raises:
        ConfigError: near names are proposed.
    """
    if len(set(methods)) != len(methods):
        raise ConfigError(f"DISTILL.METHODS: expected each loss once, got {list(methods)}")
    for name in methods:
        if name not in losses.names():
            raise ConfigError(
                f"DISTILL.METHODS: no loss is called {name!r}; {near_names(name, losses.names())}"
            )


def section_defaults(name: str) -> dict[str, object]:
    """Key -> default of the section of a loss."""
    return {
        key.upper(): _as_setting(key.upper(), value) for key, value in losses.defaults(name).items()
    }


def add_sections(
    distill: CfgNode,
    names: Iterable[str],
    defaults: Callable[[str], Mapping[str, object]] = section_defaults,
) -> None:
    """Give ``DISTILL`` the sections of some losses; those that it has stay as they are.

    Args:
        distill: the section; its type is that of the sections in it.
        names: of registered losses.
        defaults: name -> the section; a trainer may have defaults of its own.
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
    """:func:`pcka.engine.config.merge_leaves`, with the sections of the losses that are named.

    A loss has its section by being named, in ``DISTILL.METHODS`` or by a setting of its own. The
    modules of ``IMPORTS`` are imported first, for what they register; those of all sources add up.

    Args:
        cfg: the whole configuration.
        leaves: dotted key -> value.
        source: where they come from, for messages.
        defaults: as for :func:`add_sections`.

    Raises:
        ConfigError: an unknown key (near ones are named), a value of another type, or a module that
            cannot be imported.
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
    """The losses whose settings are among dotted keys, such as ``DISTILL.KD.WEIGHT``."""
    sections = [key.split(".")[1] for key in keys if key.startswith("DISTILL.") and key.count(".")]
    return [name for name in dict.fromkeys(sections) if name in losses.names()]


def changed_settings(had: CfgNode, wanted: CfgNode) -> dict[str, tuple[object, object]]:
    """What two configurations do not share: dotted key -> (value had, value wanted).

    Compared as YAML holds them: a tuple is a list, and one value for all stages is as many equal
    ones. A key that ``had`` lacks is None there. Settings of losses that ``had`` leaves out do not
    count: where the other names them, ``DISTILL.METHODS`` differs.
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
    """Return the losses of ``DISTILL.METHODS``, each with the keywords of its section.

    ``STAGES`` are names of taps; ``all`` and ``all_preact`` stand for ``stage1``, ``stage2``, …
    and ``stage1_preact``, …; an empty list for ``default_stages``. A setting of each stage may
    hold a single value, which then serves all.

    Args:
        methods: names of losses.
        sections: the section ``DISTILL``; a loss without one has its own defaults.
        taps: names of what is tapped.
        default_stages: what an empty ``STAGES`` stands for; () refuses it.
        unfit: loss -> why it cannot serve here, or None.
        taps_key: the key that adds taps, for messages.

    Raises:
        ConfigError: an unknown loss, values that a loss refuses, or a loss that is unfit.
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
            # Of a wrong name the number of its settings is wrong, too.
            _check_tapped(name, keywords.get("stages", ()), taps, taps_key)
            raise ConfigError(f"DISTILL.{name}: {error}") from error
        if reason := unfit(loss):
            raise ConfigError(f"DISTILL.METHODS: {name} {reason}")
        _check_tapped(name, loss.taps, taps, taps_key)
        built.append(loss)
    return built


def numbered_stages(taps: Iterable[str]) -> list[str]:
    """The taps ``stage0``, ``stage1``, … alone."""
    return [name for name in taps if name.startswith("stage") and name[5:].isdigit()]


def _with_stages(
    name: str,
    keywords: Mapping[str, Any],
    taps: Collection[str],
    default_stages: Sequence[str],
    taps_key: str,
) -> dict[str, Any]:
    """The keywords with the wildcards replaced, and single values repeated for all stages."""
    numbered = [stage for stage in numbered_stages(taps) if stage != "stage0"]
    stages: list[str] = []
    for stage in keywords["stages"] or default_stages:
        if stage not in WILDCARDS:
            stages.append(stage)
        elif numbered:
            stages += [found + WILDCARDS[stage] for found in numbered]
        else:
            there = ", ".join(taps) or "no taps"
            raise UntappedError(
                f"DISTILL.{name}.STAGES: {stage!r} stands for all numbered stages but the stem; "
                f"there are none; there are {there}, and {taps_key} adds them"
            )
    if not stages:
        raise ConfigError(
            f"DISTILL.{name}.STAGES: expected one or more stages, got none: the loss is nothing"
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
            f"DISTILL.{name}: {', '.join(missing)} is not tapped; there are "
            f"{', '.join(taps) or 'none'}, and {taps_key} adds more"
        )


def _as_setting(key: str, default: object) -> object:
    """A keyword's default as the configuration holds it."""
    if isinstance(default, tuple):
        return list(default)
    return [default] if key in PER_STAGE and not isinstance(default, list) else default


def _as_keyword(value: object) -> Any:
    return tuple(map(_as_keyword, value)) if isinstance(value, list | tuple) else value


def _merged(value: object) -> object:
    """A list of one value for each stage without its repetitions, where they are all equal."""
    if not isinstance(value, list | tuple):
        return [value]
    distinct = [item for item, _ in groupby(value)]
    return distinct if len(distinct) == 1 else list(value)
