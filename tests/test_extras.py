from __future__ import annotations

import sys

import pytest

from pcka.extras import optional_package, require_packages


def test_a_package_that_is_there_is_handed_over():
    assert optional_package("json.decoder") is sys.modules["json.decoder"]
    require_packages("json", "sqlite3", extra="train")


def test_what_is_missing_is_named_with_the_extra():
    with pytest.raises(
        ImportError, match=r"no_such is not installed; run pip install 'pcka\[export\]'"
    ):
        optional_package("no_such.part")
    with pytest.raises(
        ImportError, match=r"no_a, no_b are not installed; .*pip install -e '\.\[train\]'"
    ):
        require_packages("json", "no_a", "no_b", extra="train")


def test_requiring_a_package_does_not_import_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    require_packages("this", extra="train")
    assert "this" not in sys.modules
