from __future__ import annotations

import json
import re
import sys
from collections import OrderedDict
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from classification import export
from classification.config import load_config
from classification.evaluate import evaluate
from classification.models import create_model
from pcka.engine.config import ConfigError

CLASSES = 7
OTHERS_PIXELS = {"STUDENT.PIXEL_MEAN": "[0.1, 0.2, 0.3]", "STUDENT.PIXEL_STD": "[0.5, 0.6, 0.7]"}


def config(name="resnet8", **keys):
    words = [str(word) for pair in {"STUDENT.NAME": name, **keys}.items() for word in pair]
    return load_config(None, ["DATA.NAME", "digits", "DATA.IMAGE_SIZE", "16", *words])


@pytest.fixture
def trained():
    """A model whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = create_model("resnet8", CLASSES)
    model(torch.randn(8, 3, 16, 16) + 1)
    return model.eval()


@pytest.fixture
def weights(trained, tmp_path):
    """Its checkpoint as a run of several processes might leave it."""
    state = {f"module.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("file", "read"),
    [("out.pth", lambda path: torch.load(path, weights_only=True)), ("out.safetensors", load_file)],
)
def test_the_weights_alone_load_into_the_plain_model(file, read, trained, weights, tmp_path):
    path = export.export_student(config(), weights, tmp_path / "folder" / file)
    assert path == tmp_path / "folder" / file
    fresh = create_model("resnet8", CLASSES)
    fresh.load_state_dict(read(path))
    assert same(fresh.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("name", "normalized"), [("out.onnx", False), ("out.onnx", True), ("out.safetensors", False)]
)
def test_a_file_says_what_its_images_and_logits_are(name, normalized, weights, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("oak\nred maple\n")
    (tmp_path / "config.yaml").write_text(config(**OTHERS_PIXELS).dump())
    words = ["--config-file", str(tmp_path / "config.yaml"), "--weights", weights]
    words += ["--output", str(tmp_path / name), *["--with-normalization"] * normalized]
    export.main(words)
    if name.endswith(".safetensors"):
        with safe_open(tmp_path / name, "pt") as file:
            about = file.metadata()
    else:
        session = onnxruntime.InferenceSession(tmp_path / name)
        about = session.get_modelmeta().custom_metadata_map
    assert about["image_size"] == "16" and about["model"] == "resnet8"
    assert json.loads(about["classes"]) == ["oak", "red maple"]
    others = " less [0.1, 0.2, 0.3], over [0.5, 0.6, 0.7]"
    assert about["pixels"] == "RGB in [0, 1]" + others * (not normalized)
    assert f"  pixels: {about['pixels']}\n" in capsys.readouterr().out


def test_torchvisions_own_constructor_loads_its_models(tmp_path):
    torch.manual_seed(0)
    name = "torchvision/resnet18"
    state = create_model(name, CLASSES).state_dict()
    torch.save(state, tmp_path / "in.pth")
    export.export_student(config(name), str(tmp_path / "in.pth"), tmp_path / "out.safetensors")
    plain = torchvision.models.resnet18(num_classes=CLASSES)
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert same(plain.state_dict(), state)


def test_an_exported_student_is_evaluated_as_before(tiny_config, tmp_path):
    cfg = tiny_config()
    torch.save(create_model(cfg.STUDENT.NAME, 10).state_dict(), tmp_path / "in.pth")
    results = [
        evaluate(cfg, weights=str(path))
        for path in (
            tmp_path / "in.pth",
            export.export_student(cfg, str(tmp_path / "in.pth"), tmp_path / "out.safetensors"),
        )
    ]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True])
def test_the_graph_gives_the_models_logits_for_any_batch(normalized, trained, weights, tmp_path):
    cfg = config(**OTHERS_PIXELS)
    path = export.export_student(cfg, weights, tmp_path / "x.onnx", with_normalization=normalized)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images_of_graph,) = session.get_inputs()
    assert images_of_graph.name == "images"
    assert images_of_graph.shape[1:] == [3, 16, 16]
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 16, 16)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        expected = trained((images - mean) / std if normalized else images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.glob("x*")] == ["x.onnx"]  # no weights beside it


@pytest.mark.slow
def test_a_graph_is_compared_with_its_model_before_it_is_written(
    digits_config, weights, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "pcka")
    path = tmp_path / "out.onnx"
    words = ["--config-file", str(digits_config), "--weights", weights, "--output", str(path)]
    export.main([*words, "STUDENT.NAME", "resnet8"])
    (told,) = re.findall(r"images differ from the model's by at most (\S+)", caplog.text)
    assert 0 <= float(told) < 1e-4
    path.unlink()
    normalize = (
        torch.nn.functional.batch_norm
    )  # the graph is made of it, the model then runs another

    def after_the_graph(session):
        monkeypatch.setattr(
            "torch.nn.functional.batch_norm", lambda *a, **k: 2 * normalize(*a, **k)
        )
        return session

    inference = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda content: after_the_graph(inference(content))
    )
    with pytest.raises(ValueError, match=r"onnxruntime: the graph's .*nothing was written"):
        export.export_student(config(), weights, path)
    assert not path.exists()


def test_a_missing_package_is_named_with_the_extra(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed; .*pcka\[export\]"):
        export.export_student(config(), weights, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("file", ["out.pt", "out"])
def test_another_format_is_refused(file, weights):
    with pytest.raises(ConfigError, match=rf"one of .pth, .safetensors, .onnx, got '{file}'"):
        export.export_student(config(), weights, file)


def test_a_normalisation_without_a_graph_is_refused(weights):
    with pytest.raises(ConfigError, match=r"with_normalization: .* got 'out.pth'; export to .onnx"):
        export.export_student(config(), weights, "out.pth", with_normalization=True)


def test_a_checkpoint_of_another_model_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="not the checkpoint of a resnet14"):
        export.export_student(config("resnet14"), weights, tmp_path / "out.pth")
    with pytest.raises(ConfigError, match=r"NUM_CLASSES: .*no 'classifier.weight' of a vgg8"):
        export.export_student(config("vgg8"), weights, tmp_path / "out.pth")
    with pytest.raises(ValueError, match="a classifier of 7 classes, but the data has 10"):
        export.export_student(config(**{"DATA.NUM_CLASSES": 10}), weights, tmp_path / "out.pth")


def test_the_classes_of_a_model_whose_only_part_is_called_module_are_found(tmp_path, monkeypatch):
    def whole(num_classes):
        return nn.Sequential(OrderedDict(module=create_model("resnet8", num_classes)))

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(whole=whole))
    state = whole(CLASSES).state_dict()
    torch.save(state, tmp_path / "in.pth")
    cfg, file = config("mine:whole"), str(tmp_path / "in.pth")
    assert same(torch.load(export.export_student(cfg, file, tmp_path / "out.pth")), state)


def test_a_file_without_weights_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"weights: '.*other.pth': expected a dict of named"):
        export.export_student(config(), str(tmp_path / "other.pth"), tmp_path / "out.pth")


def test_the_command_line_exports(digits_config, weights, tmp_path, capsys):
    given = ["--weights", weights, "--output", str(tmp_path / "out.pth"), "STUDENT.NAME", "resnet8"]
    path = export.main(["--config-file", str(digits_config), *given])
    assert path.exists()
    assert capsys.readouterr().out.startswith(f"{path}: resnet8, 0.")
