"""Loss modules by name, for configuration files; each is imported when first needed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pcka.losses.base import Loss

L = TypeVar("L", bound=type[Loss])

# Module -> its names in pcka.losses: first the loss, which is built by its name in upper case, then
# its functions.
PUBLIC = {
    "at": "AT at_loss",
    "cc": "CC cc_loss cc_neighbours_loss",
    "crd": "CRD crd_loss",
    "cross_entropy": "CE",
    "crosskd": "CrossKD",
    "ctkd": "CTKD ctkd_loss",
    "cwd": "CWD cwd_loss",
    "densekd": "DenseKD dense_boxes_loss dense_scores_loss",
    "dist": "DIST dist_loss",
    "dkd": "DKD dkd_loss",
    "fcka": "FCKA fcka_loss",
    "fgd": "FGD fgd_loss fgd_relation_loss",
    "fitnet": "FitNet fitnet_loss",
    "ickd": "ICKD ickd_loss",
    "ifvd": "IFVD ifvd_loss",
    "ikl": "IKL ikl_loss",
    "itrd": "ITRD itrd_loss",
    "kd": "KD kd_loss",
    "kdsvd": "KDSVD kdsvd_loss",
    "lcka": "LCKA lcka_loss",
    "ld": "LD ld_loss",
    "mgd": "MGD mgd_loss",
    "mlkd": "MLKD mlkd_loss",
    "nkd": "NKD nkd_loss",
    "nst": "NST nst_loss",
    "ofd": "OFD ofd_loss",
    "patched": "Patched patched_loss",
    "pcka": "PCKA pcka_loss",
    "pixelcka": "PixelCKA pixel_cka_loss",
    "pixelcwd": "PixelCWD",
    "pixelkd": "PixelKD pixel_kd_loss",
    "pkd": "PKD pkd_loss",
    "pkt": "PKT pkt_loss",
    "rcka": "RCKA rcka_loss",
    "reviewkd": "ReviewKD hcl_loss",
    "rkd": "RKD rkd_loss",
    "roikd": "RoIKD roi_boxes_loss",
    "rld": "RLD rld_loss",
    "sp": "SP sp_loss",
    "srrl": "SRRL srrl_loss",
    "vid": "VID vid_loss",
    "vkd": "VKD vkd_loss",
    "wttm": "WTTM wttm_loss",
}
MODULE_OF = {name: module for module, names in PUBLIC.items() for name in names.split()}
CLASS_OF = {names.split()[0].upper(): names.split()[0] for names in PUBLIC.values()}

_REGISTERED: dict[str, type[Loss]] = {}


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a custom loss available to :func:`build` under ``name``.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(loss: L) -> L:
        if name in names():
            raise ValueError(f"name: a loss {name!r} is already registered; choose another name")
        _REGISTERED[name] = loss
        return loss

    return decorate


def public(name: str) -> Any:
    """The loss or function that ``pcka.losses`` exports as ``name``; imports its module.

    Raises:
        AttributeError: there is none.
    """
    if name in MODULE_OF:
        return getattr(importlib.import_module(f"{__package__}.{MODULE_OF[name]}"), name)
    hint = f"; the class of the loss {name} is {CLASS_OF[name]}" if name in CLASS_OF else ""
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}{hint}")


def build(name: str, **kwargs: object) -> Loss:
    """Build the loss module registered under ``name`` with the keywords of its ``__init__``.

    Raises:
        ValueError: an unknown name or keyword; the message lists the known ones.
    """
    loss = find(name)
    accepted = defaults(name)
    for keyword in kwargs:
        if keyword not in accepted:
            raise ValueError(f"{name} takes no {keyword!r}; it takes {', '.join(accepted)}")
    return loss(**kwargs)


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted({*CLASS_OF, *_REGISTERED})


def defaults(name: str) -> dict[str, object]:
    """Keyword -> default of the loss registered under ``name``.

    Raises:
        ValueError: an unknown name.
    """
    parameters = inspect.signature(find(name)).parameters
    return {keyword: parameter.default for keyword, parameter in parameters.items()}


def described(name: str) -> tuple[str, dict[str, str]]:
    """Summary of the loss registered under ``name``, and keyword -> description, from docstrings.

    Raises:
        ValueError: an unknown name.
    """
    from pcka.losses.documentation import keywords, summary  # few commands print them

    loss = find(name)
    return summary(loss), keywords(loss)


def find(name: str) -> type[Loss]:
    """The class of the loss registered under ``name``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name in CLASS_OF:
        return cast(type[Loss], public(CLASS_OF[name]))
    if name not in _REGISTERED:
        raise ValueError(f"name: no loss {name!r}; available: {', '.join(names())}")
    return _REGISTERED[name]
