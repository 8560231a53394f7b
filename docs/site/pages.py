"""What the site adds to the pages: the contents, and what follows from docstrings and comments.

A page says where by a comment, ``<!-- site: losses -->``, which GitHub does not show. A link to a
folder, which only GitHub can show, becomes its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pcka
from pcka import losses
from pcka.engine.help_keys import Key, loss_keys, shown_default
from pcka.losses.registry import PUBLIC

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Caption -> pages, of docs/ where they name no other folder.
CONTENTS = {
    "First steps": "start installation own library frameworks",
    "Training": "classification data detection distributed choosing teachers analysis reproduce",
    "Reference": "keys losses api errors",
    "Further": "extending design kernels tests/emulation/README benchmarks/README results log",
}
# What the API page has beside what `pcka` itself offers.
MODULES = {
    "pcka.taps": "Observer find_logits as_map",
    "pcka.teacher": "fold_batch_norms",
    "pcka.checkpoint": "LoadReport extract_state_dict check_values",
    "pcka.losses": "Loss StagewiseLoss LogitLoss Term Outputs Context build names defaults "
    "register standardized_logits DegenerateLevelWarning",
    "pcka.analysis": "cka_matrix CKATable MinibatchCKA find_layers layerwise_cka u_centered_gram "
    "patch_grams sample_grams GramPair grams_figure",
}
MARK = re.compile(r"^<!-- site: (.+?) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^][]+)\]\(([^)\s:#]+)\)")
SPECIAL = re.compile(r"([\\`*_<>|\[\]$~])")


def contents() -> str:
    """The tree of pages, which is the navigation."""
    trees = []
    for caption, names in CONTENTS.items():
        paths = "\n".join(name if "/" in name else f"docs/{name}" for name in names.split())
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{paths}\n```\n")
    return "\n".join(trees)


def keys_of_classification() -> str:
    """The keys of classification, a table for each section."""
    from classification.help_keys import keys

    sections: dict[str, list[Key]] = {}
    for key in keys():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    return "\n".join(
        f"### {f'`{name}`' if name else 'Without a section'}\n\n{table(of_section)}"
        for name, of_section in sections.items()
    )


def keys_of_detection() -> str:
    """The keys that detection adds to detectron2's."""
    from detection.help_keys import keys

    return table(keys())


def all_losses() -> str:
    """Every loss: what it is, its settings, and its functions."""
    from detection.config import section_defaults

    parts = []
    for name in losses.names():
        about, _ = losses.described(name)
        cls, *functions = PUBLIC[losses.find(name).__module__.rpartition(".")[2]].split()
        documented = "".join(f".. autofunction:: pcka.losses.{each}\n" for each in functions)
        parts += [
            f"## {name}\n",
            f"{plain(about)}. In Python `pcka.losses.{cls}`.\n",
            table(loss_keys(name), dict(section_defaults(name))),
            f"```{{eval-rst}}\n{documented}```\n" if documented else "",
        ]
    return "\n".join(parts)


def api() -> str:
    """The documentation of what the library offers."""
    named = {"pcka": " ".join(name for name in pcka.__all__ if name != "losses"), **MODULES}
    parts = []
    for module, names in named.items():
        documented = f".. currentmodule:: {module}\n\n"
        for name in names.split():
            kind = "class" if isinstance(getattr(import_module(module), name), type) else "function"
            documented += f".. auto{kind}:: {module}.{name}\n"
            documented += "   :members:\n" if kind == "class" else ""
        parts.append(f"## `{module}`\n\n```{{eval-rst}}\n{documented}```\n")
    return "\n".join(parts)


GENERATED: Mapping[str, Callable[[], str]] = {
    "contents": contents,
    "keys of classification": keys_of_classification,
    "keys of detection": keys_of_detection,
    "losses": all_losses,
    "api": api,
}


def table(keys: Iterable[Key], of_detectors: Mapping[str, object] = {}) -> str:
    """Keys as a table of Markdown; a default that detectors have otherwise stands beside it."""
    rows = ["| key | default | |", "| --- | --- | --- |"]
    for key in keys:
        default = f"`{shown_default(key)}`"
        other = of_detectors.get(key.name.rpartition(".")[2], key.default)
        if other != key.default:
            default += f"; of detectors `{other}`"
        rows.append(f"| `{key.name}` | {default} | {plain(key.text)} |")
    return "\n".join(rows) + "\n"


def plain(text: str) -> str:
    """A text as it is, whatever Markdown would make of it."""
    return SPECIAL.sub(r"\\\1", text)


def completed(text: str, folder: Path) -> str:
    """A page of a folder with what the site adds to it."""

    def without_folders(link: re.Match[str]) -> str:
        return link[1] if (folder / link[2]).is_dir() else link[0]

    return MARK.sub(lambda mark: GENERATED[mark[1]](), LINK.sub(without_folders, text))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        text = source[0] + ("\n<!-- site: contents -->\n" if name == app.config.root_doc else "")
        source[0] = completed(text, app.env.doc2path(name).parent)

    app.connect("source-read", read)
