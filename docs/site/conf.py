"""The documentation as a site: the pages of README.md and docs/ as they are, by Sphinx."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

project = "pcka"
root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "benchmarks/README.md", "tests/emulation/README.md"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "pages",
]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
napoleon_use_rtype = False  # "A scalar: ..." stays one sentence
napoleon_use_ivar = True  # an attribute that a docstring and a class both name stands once
smartquotes = False  # two dashes are an option, and quotes are part of values
html_theme = "furo"
html_title = "pcka"
templates_path = ["."]
html_additional_pages = {"index": "index.html"}
html_copy_source = False
