from __future__ import annotations

import os
import pickle
import re
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from detection.checkpoint import SafeCheckpointer, WeightsError, load_weights
from detection.inherit import teacher_weights
from pcka.engine.config import ConfigError
from pcka.files import CheckpointError


class _RunsCode:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def _dump(path, value):
    path.write_bytes(pickle.dumps(value))
    return str(path)


def test_zoo_pickles_load(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"model": {"weight": weight, "bias": np.zeros(2)}, "__author__": "model zoo"}
    model = nn.Linear(3, 2)
    load_weights(model, _dump(tmp_path / "zoo.pkl", stored))
    assert torch.equal(model.weight, torch.from_numpy(weight))


def test_caffe2_pickles_load_by_detectron2s_heuristics(tmp_path):
    # Caffe2 calls it conv1_w, detectron2 stem.conv1.weight; momenta are no weights.
    model = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1, bias=False)})})
    weight = np.random.RandomState(0).randn(4, 3, 1, 1).astype(np.float32)
    stored = {"conv1_w": weight, "conv1_w_momentum": weight}
    load_weights(model, _dump(tmp_path / "R-50.pkl", stored))
    assert torch.equal(model["stem"]["conv1"].weight, torch.from_numpy(weight))


def test_a_pickle_of_weights_alone_loads(tmp_path):
    stored = {"model": {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2)}}
    model = nn.Linear(3, 2)
    load_weights(model, _dump(tmp_path / "own.pkl", stored))
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_weights_of_pycls_load_by_detectron2s_heuristics(tmp_path):
    path = tmp_path / "RegNetX.pyth"
    torch.save({"model_state": {"f.weight": torch.ones(2, 3), "f.bias": torch.ones(2)}}, path)
    model = nn.ModuleDict({"f": nn.Linear(3, 2)})
    load_weights(model, str(path))
    assert torch.equal(model["f"].weight, torch.ones(2, 3))


def test_a_damaged_pickle_and_one_without_arrays_are_named(tmp_path):
    path = tmp_path / "damaged.pkl"
    path.write_bytes(pickle.dumps({"model": np.zeros(1000)})[:200])
    with pytest.raises(ValueError, match=r"damaged\.pkl: is damaged or not a pickle"):
        load_weights(nn.Linear(1, 1), str(path))
    with pytest.raises(ValueError, match=r"empty\.pkl: has no arrays, only epoch"):
        load_weights(nn.Linear(1, 1), _dump(tmp_path / "empty.pkl", {"epoch": 3}))


def test_a_file_that_cannot_be_fetched_is_named(monkeypatch):
    def offline(_self, _path):
        raise URLError("no route to host")

    monkeypatch.setattr("iopath.common.file_io.PathManager.get_local_path", offline)
    url = "https://example.org/teacher.pth"
    told = rf"{re.escape(url)}: cannot be read: .*no route to host"
    with pytest.raises(WeightsError, match=f"^{told}"):
        load_weights(nn.Linear(1, 1), url)
    with pytest.raises(ConfigError, match=rf"^DISTILL\.TEACHER\.WEIGHTS: {told}"):
        teacher_weights(nn.Linear(1, 1), url)


def test_a_start_of_which_nothing_fits_is_refused(tmp_path):
    path = str(tmp_path / "w.pth")
    torch.save({"other": torch.ones(2, 3), "bias": torch.ones(7)}, path)
    checkpointer = SafeCheckpointer(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"w\.pth: none of its weights matches the model in name and shape"
    ):
        checkpointer.resume_or_load(path, resume=False)
    torch.save({"other": torch.ones(2, 3), "bias": torch.ones(2)}, path)
    assert checkpointer.resume_or_load(path, resume=False) is not None


def test_a_pickle_that_asks_for_code_is_refused(tmp_path, capfd):
    path = _dump(tmp_path / "bad.pkl", {"model": _RunsCode(), "__author__": "x"})
    with pytest.raises(ValueError, match=r"bad\.pkl: the pickle asks for .*system; only arrays"):
        load_weights(nn.Linear(1, 1), path)
    assert "must not run" not in capfd.readouterr().out


def test_a_pth_that_asks_for_code_is_refused(tmp_path, capfd):
    path = tmp_path / "bad.pth"
    torch.save({"model": _RunsCode()}, path)
    with pytest.raises(ValueError, match=r"bad\.pth"):
        load_weights(nn.Linear(1, 1), str(path))
    assert "must not run" not in capfd.readouterr().out


class _TooLarge:
    def __reduce__(self):
        return np.ndarray, ((2**40,),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": 5}, "expected a mapping of weights under 'model', got int"),
        ({"model": {"a": "b"}}, "expected a Tensor under every name, got str under 'a'"),
        ({3: torch.ones(2)}, "expected a Tensor under every name, got Tensor under 3"),
        ([1], "expected a mapping of weights, got list"),
    ],
)
def test_what_is_no_weight_in_a_pth_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    for load in (load_weights, lambda *given: SafeCheckpointer(given[0]).load(given[1])):
        with pytest.raises(WeightsError, match=rf"odd\.pth: {message}"):
            load(nn.Linear(1, 1), str(tmp_path / "odd.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"blobs": 5}, "expected a mapping of weights under 'blobs', got int"),
        ({"model": {"a": "b"}}, "expected a ndarray under every name, got str under 'a'"),
        ([1], "expected a mapping of weights, got list"),
        ({"model": _TooLarge()}, "is damaged or not a pickle: .*allocate"),
    ],
)
def test_what_is_no_weight_in_a_pickle_is_named(tmp_path, content, message):
    with pytest.raises(WeightsError, match=rf"odd\.pkl: {message}"):
        load_weights(nn.Linear(1, 1), _dump(tmp_path / "odd.pkl", content))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    path = str(tmp_path / "diverged.pth")
    torch.save({"weight": torch.full((2, 3), value), "bias": torch.ones(2)}, path)
    message = r"diverged\.pth: 1 of its weights are NaN, infinite .*: weight"
    for load in (load_weights, lambda *given: SafeCheckpointer(given[0]).load(given[1])):
        with pytest.raises(CheckpointError, match=message):
            load(nn.Linear(3, 2), path)


def test_other_shapes_are_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(nn.Linear(4, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"1 of 2 weights are missing: weight.*\(2, 4\).*\(2, 3\)"):
        load_weights(nn.Linear(3, 2), str(path))


def test_only_the_wanted_weights_have_to_be_there(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(2, 3)}, path)
    model = nn.Linear(3, 2)
    load_weights(model, str(path), prefixes=["weight"])
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000001", iteration=1)
    monkeypatch.undo()
    assert checkpointer.load(checkpointer.get_checkpoint_file())["iteration"] == 1
