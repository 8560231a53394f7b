from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pcka import losses
from pcka.losses import base, registry


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


def test_the_losses_of_the_paper_are_registered():
    assert {"CE", "FCKA", "KD", "LCKA", "PCKA", "RCKA"} <= set(losses.names())
    assert losses.names() == sorted(losses.names())


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_builds_from_defaults_that_yaml_can_hold(name):
    parameters = inspect.signature(type(losses.build(name)).__init__).parameters.values()
    kinds = {parameter.kind for parameter in parameters if parameter.name != "self"}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    defaults = losses.defaults(name)
    assert inspect.Parameter.empty not in defaults.values()
    through_yaml = yaml.safe_load(yaml.safe_dump(_as_lists(defaults)))
    module = losses.build(name, **through_yaml)
    assert _settings(module) == _settings(losses.build(name))


def _settings(module):
    return {key: value for key, value in vars(module).items() if not key.startswith("_")}


def _as_lists(value):
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def test_build_passes_the_keywords_on():
    assert losses.build("KD", weight=0.9, temperature=2.0).temperature == 2.0
    assert losses.build("FCKA", stages=["a", "b"], weights=[1, 2]).taps == ("a", "b")


def test_defaults_are_those_of_the_module():
    assert losses.defaults("KD") == {
        "weight": 1.0,
        "temperature": 4.0,
        "standardize": False,
    }


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no loss 'CKA'.*FCKA, FGD, FITNET, .*, KD, "):
        losses.build("CKA")
    with pytest.raises(ValueError, match="no loss 'CKA'"):
        losses.defaults("CKA")


def test_an_unknown_keyword_lists_the_accepted_ones():
    with pytest.raises(ValueError, match=r"KD takes no 'tau'; it takes weight, temperature"):
        losses.build("KD", tau=4.0)


def test_a_name_is_registered_once(scratch_registry):
    class Mine(losses.KD):
        pass

    registry.register("Mine")(Mine)
    assert registry.names() == sorted([*registry.CLASS_OF, "Mine"])
    assert type(losses.build("Mine", temperature=2.0)) is Mine
    for taken in ("Mine", "KD"):
        with pytest.raises(ValueError, match=f"'{taken}' is already registered"):
            registry.register(taken)(Mine)


def test_public_names_are_those_that_type_checkers_see():
    """The table of the registry and the imports under TYPE_CHECKING say the same."""
    tree = ast.parse(Path(losses.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: statement.module.rpartition(".")[2]
        for statement in checked.body
        for alias in statement.names
    }
    assert seen == registry.MODULE_OF
    assert all(getattr(losses, name).__name__ == name for name in registry.MODULE_OF)
    assert set(losses.__all__) <= set(dir(losses))


def test_a_loss_is_found_by_its_class_and_by_its_name():
    assert type(losses.build("FITNET")) is losses.FitNet
    with pytest.raises(AttributeError, match="class of the loss FITNET is FitNet"):
        losses.FITNET  # noqa: B018
    with pytest.raises(AttributeError, match=r"pcka\.losses' has no attribute 'KL'$"):
        losses.KL  # noqa: B018


@pytest.mark.parametrize("name", ["Loss", "StagewiseLoss", "LogitLoss"])
def test_what_a_loss_of_ones_own_derives_from_is_public(name):
    assert name in losses.__all__
    assert getattr(losses, name) is getattr(base, name)


LAZY = """
import sys, pcka.losses
shared = {"base", "checks", "heads", "numerics", "registry"}
of_losses = lambda: {m.rpartition(".")[2] for m in sys.modules if m.startswith("pcka.losses.")}
assert of_losses() == shared, of_losses()
assert "KD" in pcka.losses.names() and of_losses() == shared
pcka.losses.build("KD")
assert of_losses() == {*shared, "kd"}, of_losses()
pcka.losses.RCKA
assert of_losses() == {*shared, "kd", "rcka", "fcka", "lcka"}, of_losses()
"""


def test_a_loss_is_imported_where_it_is_first_named():
    subprocess.run([sys.executable, "-c", LAZY], check=True)
