"""The pages that the site completes, and those that repeat what the code or a library says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torchvision
import yaml

from classification.help_keys import keys as keys_of_classification
from classification.models import create_model
from detection.help_keys import keys as keys_of_detection
from pcka import losses

ROOT = Path(__file__).resolve().parents[1]
ERRORS = (ROOT / "docs" / "errors.md").read_text()
TEACHERS = (ROOT / "docs" / "teachers.md").read_text()


class Text(HTMLParser):
    """The text of a page, without its tags."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(page.read_text())

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_of(page: Path) -> str:
    return " ".join("".join(Text(page).parts).split())


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_key_and_loss(tmp_path):
    command = [sys.executable, "-W", "ignore::FutureWarning", "-m", "sphinx"]
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", "docs/site"]
    result = subprocess.run(
        [*command, *options, "-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    site = tmp_path / "site"
    assert "README.html" in (site / "index.html").read_text()
    page = text_of(site / "docs" / "keys.html")
    for key in (*keys_of_classification(), *keys_of_detection()):
        assert f"{key.name} " in page and " ".join(key.text.split()) in page, key.name
    page = text_of(site / "docs" / "losses.html")
    for name in losses.names():
        assert all(
            f"DISTILL.{name}.{keyword.upper()} " in page for keyword in losses.defaults(name)
        )
    assert "pcka.losses.fcka_loss(" in page
    page = text_of(site / "docs" / "api.html")
    assert "class pcka.Distiller(" in page and "observe_student(" in page
    # A link of GitHub's to a folder is text here, and one to a page leads there.
    page = (site / "docs" / "own.html").read_text()
    assert 'href="extending.html#pair"' in page
    assert "../configs/reproduce" not in (site / "docs" / "reproduce.html").read_text()


def literals(node: ast.AST) -> Iterator[str]:
    """The texts within an expression, with a gap where a value is put in."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_the_messages_of_errors_are_those_of_the_code():
    files = [
        p for name in ("pcka", "classification", "detection") for p in (ROOT / name).rglob("*.py")
    ]
    said = "\n".join(text for file in files for text in literals(ast.parse(file.read_text())))
    messages = re.findall(r"^\| `([^`]+)` \|", ERRORS, re.MULTILINE)
    assert len(messages) > 25
    missing = [m for m in messages for piece in m.split(" … ") if piece not in said]
    assert not missing


def test_the_relational_losses_are_named():
    page = (ROOT / "docs" / "distributed.md").read_text()
    named = re.search(r"\*\*Relational losses\*\*: ([A-Z, \n]+)\.", page)[1]
    relational = [name for name in losses.names() if losses.find(name).relational]
    assert sorted(re.split(r",\s*", named)) == relational


def rows(title: str) -> list[list[str]]:
    """The cells of the table of a section of the page on teachers."""
    section = re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", TEACHERS, re.DOTALL | re.MULTILINE)[1]
    table = [line[1:-1].split("|") for line in section.splitlines() if line[:1] == "|"]
    return [[cell.strip(" `") for cell in row] for row in table[2:]]


def test_teachers_of_torchvision_are_as_torchvision_says():
    for link, size, name, accuracy in rows("ImageNet: torchvision"):
        file, url = re.fullmatch(r"\[`(.+)`\]\((.+)\)", link).groups()
        known = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
        (weights,) = (w for w in known if w.url == url)
        assert url.endswith(file) and weights.meta["_file_size"] == float(size)
        assert weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] == float(accuracy)


def test_teachers_of_detectron2_are_those_of_its_model_zoo():
    from detectron2 import model_zoo

    for config, link in rows("COCO: detectron2"):
        assert f"]({model_zoo.get_checkpoint_url(config)})" in link


def test_teachers_of_cifar_are_models_here_with_the_accuracy_of_the_configurations():
    files = ROOT.glob("configs/classification/cifar100/*.yaml")
    teachers = [yaml.safe_load(file.read_text()).get("TEACHER", {}) for file in files]
    stated = {t.get("NAME"): t.get("ACCURACY") for t in teachers}
    for file, name, accuracy in rows("CIFAR-100"):
        assert file == f"{name}_vanilla/ckpt_epoch_240.pth"
        assert float(accuracy or 0) == (stated.get(name) or 0)
        create_model(name, 100)
    for file, name, _, digest in rows("CIFAR-10: "):
        assert re.fullmatch(r".+-(\w{8})\.th", file)[1] == digest[:8]
        create_model(name, 10)
