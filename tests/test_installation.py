"""What users get: the archives, installed where nothing else is, and run there.

The environments are made without a download. Each is a new one whose path shows, by links, those
packages of the running one that pcka's metadata asks for, and no others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__")
BUILT_AT_THE_ROOT = {"build", "data", "dist", "output"}
BUILD_TOOLS = ("setuptools", "wheel")  # for an editable install without a download

RESULT = """
import sys, torch, pcka
heavy = {"classification", "detection", "fvcore", "matplotlib", "scipy", "tensorboard",
         "torchvision", "yaml"} & set(sys.modules)
assert not heavy, heavy
torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 9, 14, requires_grad=True), torch.randn(2, 3, 9, 14)
loss = pcka.losses.pcka_loss(student, teacher, patch_size=4)
loss.backward()
print(pcka.build_info()["extension"], loss.item(), student.grad.norm().item(), pcka.__file__)
"""


def run(*command: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run outside the repository, with nothing of it on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PCKA_REQUIRE")}
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd="/",
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a clone does not have of a folder."""
    return BUILT(folder, names) | (BUILT_AT_THE_ROOT if Path(folder) == ROOT else set())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clone: the tree without what was built in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "pcka", ignore=left_out)


@pytest.fixture(scope="module")
def archives(source, tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was compiled from it."""
    folder = tmp_path_factory.mktemp("archives")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    run(*build, PCKA_SKIP_CUDA="1")
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of the installed distributions that the requirements come to."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:  # of another platform, say
            continue
        extras = {"", *requirement.extras}
        if requirement.name in found and extras == {""}:
            continue
        found.add(requirement.name)
        for text in distribution.requires or ():
            waiting += [(Requirement(text), name) for name in extras]
    return found


class Environment:
    """A new virtual environment that sees the given distributions of the running one."""

    def __init__(self, folder: Path, distributions: Iterable[str]) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        [self.packages] = folder.glob("lib/python*/site-packages")
        links = folder / "links"
        links.mkdir()
        for name in distributions:
            for file in metadata.files(name) or ():
                top = file.parts[0]
                if top not in ("..", "__pycache__") and not (links / top).is_symlink():
                    target = Path(str(metadata.distribution(name).locate_file(top)))
                    (links / top).symlink_to(target)
        (self.packages / "links.pth").write_text(f"{links}\n")

    def install(self, *arguments: str | Path, **variables: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index")
        run(*pip, "--no-deps", *arguments, **variables)

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        return run(self.python, *arguments, check=check)


def requirements_of(wheel: Path, extra: str = "") -> set[str]:
    """What the wheel's own metadata asks for, itself left out."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    stated = [Requirement(x.split(":", 1)[1]) for x in lines if x.startswith("Requires-Dist:")]
    wanted = [r for r in stated if not r.marker or r.marker.evaluate({"extra": extra})]
    inner = set().union(
        *(requirements_of(wheel, e) for r in wanted for e in r.extras if r.name == "pcka")
    )
    return inner | {f"{r.name}[{','.join(r.extras)}]" for r in wanted if r.name != "pcka"}


@pytest.fixture(scope="module")
def environment(archives, tmp_path_factory) -> Environment:
    """The wheel beside what it needs."""
    made = Environment(tmp_path_factory.mktemp("plain"), needed(requirements_of(archives[1])))
    made.install(archives[1])
    return made


def test_the_wheel_holds_the_library_alone(archives):
    names = zipfile.ZipFile(archives[1]).namelist()
    assert {name.split("/")[0] for name in names} == {"pcka", "pcka-0.1.0.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pcka").rglob("*.py")}
    libraries = {f"pcka/{name}.abi3.so" for name in ("_build_info", "_cpu")}
    data = {"pcka/py.typed", "pcka/engine/report.html.jinja"}
    assert {n for n in names if n.startswith("pcka/")} == modules | libraries | data


def test_the_sdist_holds_the_repository(source, archives):
    with tarfile.open(archives[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    files = {name for name in files if not BUILT("", name.split("/")) and "build/" not in name}
    assert len(files) > 300 and files <= held, files - held


def test_the_wheel_runs_where_nothing_but_its_requirements_is(environment):
    for name in ("torchvision", "fvcore", "yaml", "classification", "detection"):
        assert environment.run("-c", f"import {name}", check=False).returncode != 0, name
    extension, loss, norm, file = environment.run("-c", RESULT).stdout.split()
    assert extension == "True"
    assert 0 < float(loss) < 1 and float(norm) > 0
    assert Path(file).is_relative_to(environment.packages)


def test_the_wheel_is_of_no_one_python(archives):
    """And says so; PCKA_TEST_PYTHON names another interpreter with torch to try it under."""
    assert "-cp310-abi3-" in archives[1].name


def test_another_python_finds_the_operators(archives, tmp_path):
    other = os.environ.get("PCKA_TEST_PYTHON")
    if not other:
        pytest.skip("PCKA_TEST_PYTHON names no other interpreter with torch")
    zipfile.ZipFile(archives[1]).extractall(tmp_path)
    extension, loss, _, file = run(other, "-c", RESULT, PYTHONPATH=str(tmp_path)).stdout.split()
    assert extension == "True" and 0 < float(loss) < 1
    assert Path(file).is_relative_to(tmp_path)


def test_a_plain_editable_install_names_the_extra_that_trains(source, archives, tmp_path):
    plain = needed([*requirements_of(archives[1]), *BUILD_TOOLS])
    made = Environment(tmp_path / "env", plain)
    made.install("--no-build-isolation", "-e", source, PCKA_SKIP_EXTENSION="1")
    made.run("-W", "ignore", "-c", "import pcka, classification")
    train = source / "classification" / "train.py"
    assert "usage: train.py" in made.run("-W", "ignore", train, "--help").stdout
    result = made.run(train, "--config-file", "F", check=False)
    assert result.returncode != 0
    assert "pip install -e '.[train]'" in result.stderr.splitlines()[-1]


def test_the_extra_train_is_all_that_classification_needs(source, archives, tmp_path):
    made = Environment(
        tmp_path / "env", needed([*requirements_of(archives[1], "train"), *BUILD_TOOLS])
    )
    made.install("--no-build-isolation", "-e", source, PCKA_SKIP_EXTENSION="1")
    shown = made.run("-W", "ignore", source / "classification" / "train.py", "--list").stdout
    assert "kd_rcka" in shown and "resnet8" in shown
