from __future__ import annotations

import inspect

import pytest
import yaml

from pcka import losses
from pcka.losses import registry


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", {})


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
    assert losses.defaults("KD") == {"weight": 1.0, "temperature": 4.0}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no loss 'CKA'.*FCKA, FITNET, .*, KD, "):
        losses.build("CKA")
    with pytest.raises(ValueError, match="no loss 'CKA'"):
        losses.defaults("CKA")


def test_an_unknown_keyword_lists_the_accepted_ones():
    with pytest.raises(ValueError, match=r"KD takes no 'tau'; it takes weight, temperature"):
        losses.build("KD", tau=4.0)


def test_a_name_is_registered_once(scratch_registry):
    registry.register("Mine")(losses.KD)
    assert registry.names() == ["Mine"]
    with pytest.raises(ValueError, match="'Mine' is registered already"):
        registry.register("Mine")(losses.CE)
