"""Descriptions of losses and their keywords, from their docstrings, as plain text."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap

from pcka.losses.base import Loss

REFERENCE = re.compile(r":func:`(?:[\w.]*\.)?(\w+)`")


def summary(loss: type[Loss]) -> str:
    """The method and its paper: first paragraph of our module, or of a class that is not ours."""
    of_ours = loss.__module__.startswith("pcka.")
    text = inspect.getdoc(sys.modules[loss.__module__] if of_ours else loss) or ""
    return _plain(text.partition("\n\n")[0])


def keywords(loss: type[Loss]) -> dict[str, str]:
    """Keyword of a loss's ``__init__`` -> its description; "" if there is none.

    A keyword that refers to a function (``temperature: of :func:`kd_loss```), or that the class
    leaves out, is looked up in the function's docstring.
    """
    own = arguments(loss)
    pointed = REFERENCE.findall(inspect.getdoc(loss) or "")
    functions = [getattr(sys.modules[loss.__module__], name, None) for name in pointed]
    elsewhere: dict[str, str] = {}
    for function in functions:
        elsewhere = arguments(function) | elsewhere
    found = {}
    for name in inspect.signature(loss).parameters:
        text = own.get(name, "")
        if not text or text.startswith("of :func:"):
            text = elsewhere.get(name, "")
        found[name] = _plain(text)
    return found


def arguments(documented: object) -> dict[str, str]:
    """Name -> text from the ``Args`` section of a docstring; {} if there is none."""
    _, _, section = (inspect.getdoc(documented) or "").partition("Args:\n")
    lines = []
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        lines.append(line)
    texts: dict[str, str] = {}
    # Entries start at the section's indent; their continuation lines are indented further.
    for entry in re.split(r"\n(?=\S)", textwrap.dedent("\n".join(lines)).strip()):
        names, colon, text = entry.partition(": ")
        if colon:
            texts |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return texts


def _plain(text: str) -> str:
    """The text without reStructuredText markup."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return " ".join(text.replace("``", "").replace("`", "").split()).rstrip(".")
