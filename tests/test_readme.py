"""The Python of the README and of the pages start, library and analysis runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from classification.models import create_model
from pcka import save_student

ROOT = Path(__file__).resolve().parents[1]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readme_shows_the_loop_of_the_library():
    assert examples("README.md") == examples("docs/library.md")[:1]


def test_the_examples_run():
    loop, functions = examples("docs/library.md")
    torch.manual_seed(0)
    names = {
        "student": create_model("resnet8", 10),
        "teacher": create_model("resnet14", 10),
        "loader": [(torch.randn(8, 3, 16, 16), torch.arange(8))] * 2,
        "student_features": torch.randn(8, 6, 4, 4),
        "teacher_features": torch.randn(8, 9, 4, 4),
        "student_logits": torch.randn(8, 10),
        "teacher_logits": torch.randn(8, 10),
        "student_map": torch.randn(2, 4, 64, 48),
        "teacher_map": torch.randn(2, 4, 64, 48),
    }
    before = [parameter.clone() for parameter in names["student"].parameters()]
    exec(loop, names)
    assert names["terms"].keys() == {
        "loss_ce", "loss_dist", "loss_fitnet_last", "loss_fcka_last",
    }  # fmt: skip
    moved = [not torch.equal(a, b) for a, b in zip(before, names["student"].parameters())]
    assert all(moved)
    exec(functions, names)


def test_a_trained_student_is_loaded_as_on_the_first_page(tmp_path, monkeypatch):
    (loading,) = examples("docs/start.md")
    monkeypatch.chdir(tmp_path)
    trained = create_model("resnet8", 10).eval()
    (tmp_path / "output" / "first").mkdir(parents=True)
    save_student(trained, "output/first/model_best.pth")
    names = {}
    exec(loading, names)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["student"](images), trained(images))


def test_the_examples_of_the_analysis_run(tmp_path, monkeypatch):
    matrix, grams = examples("docs/analysis.md")
    monkeypatch.chdir(tmp_path)
    names = {
        "model_a": create_model("resnet8", 10),
        "model_b": create_model("resnet14", 10),
        "loader": [(torch.randn(8, 3, 16, 16), torch.arange(8))] * 2,
    }
    exec(matrix, names)
    assert names["table"].values.shape == (3, 2)
    names["student_map"], names["teacher_map"] = torch.randn(2, 2, 4, 64, 48)
    exec(grams, names)
    assert names["pair"].student.shape == (12, 12)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cka.png", "cka.csv", "grams.png"}
