"""The build's decisions, what an installation says of itself, and what its archives carry."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import pcka

ROOT = Path(__file__).resolve().parents[1]

needs_extension = pytest.mark.skipif(
    not pcka.build_info()["extension"], reason="the compiled operators are not loaded"
)


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, run without compiling anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PCKA_SKIP_EXTENSION", "1")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    return runpy.run_path("setup.py")


def fake_nvcc(folder: Path, release: str, top: Path) -> Path:
    """An nvcc that answers --version and --dryrun, lying outside its toolkit as a wrapper does."""
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "Cuda compilation tools, release {release}, V1";;'
        f' --dryrun) echo "#\\$ TOP={top}" >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_the_toolkits_root_is_what_nvcc_says_not_where_it_lies(setup_py, tmp_path):
    (tmp_path / "bin").mkdir()
    top = tmp_path / "cuda-13.0"
    top.mkdir()
    toolkit = setup_py["CudaToolkit"](str(fake_nvcc(tmp_path / "bin", "13.0", top)))
    assert toolkit.version == (13, 0)
    assert toolkit.root == str(top)


def test_another_cuda_major_makes_a_cpu_build_that_names_both(setup_py, tmp_path, monkeypatch):
    fake_nvcc(tmp_path, "12.4", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    toolkit, reason = setup_py["cuda_toolkit"]("13.0")
    assert toolkit is None
    assert "nvcc is CUDA 12.4 and torch is CUDA 13.0" in reason
    toolkit, reason = setup_py["cuda_toolkit"]("12.8")
    assert toolkit is not None and reason == ""
    assert setup_py["cuda_toolkit"](None) == (None, "torch is a CPU build")


def test_no_compiler_is_no_obstacle(setup_py, monkeypatch):
    monkeypatch.delenv("PCKA_SKIP_EXTENSION")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_py["skip_reason"]() == "no C++ compiler found"
    assert setup_py["extensions"]() == ([], {})


def test_one_minimum_torch_everywhere(setup_py):
    minimum = setup_py["MINIMUM_TORCH"]
    assert f'"torch>={minimum}"' in (ROOT / "pyproject.toml").read_text()
    macro = dict([setup_py["stable_abi_macro"]()])["TORCH_TARGET_VERSION"]
    assert f"TORCH_TARGET_VERSION={macro}" in (ROOT / "CMakeLists.txt").read_text()


def test_the_architectures_are_those_of_the_environment(setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX;8.0")
    assert setup_py["compiled_archs"]() == ["sm_80", "compute_90", "sm_90"]


@needs_extension
def test_build_info_says_what_was_compiled():
    info = pcka.build_info()
    assert info["torch_version"] and info["compiler"] and info["minimum_torch"] == "2.10"
    assert info["cuda"] == Path(pcka.__file__).with_name("_cuda.abi3.so").exists()
    assert all(arch.startswith(("sm_", "compute_")) for arch in info["cuda_archs"])
    assert "cpu" not in info["fallback"]


@pytest.mark.skipif(
    not (shutil.which("nvcc") and torch.version.cuda and pcka.build_info()["extension"]),
    reason="no nvcc, or torch is a CPU build",
)
def test_cuda_code_is_compiled_where_it_can_be():
    info = pcka.build_info()
    assert info["cuda"] or "majors differ" in info["note"]


def run_python(code: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=check,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


RESULT = """
torch.manual_seed(0)
x = torch.randn(2, 3, 9, 14, requires_grad=True)
y = torch.randn(2, 3, 9, 14)
for _ in range(2):
    loss = pcka.patch_cka(x, y, patch_size=4).sum() + pcka.cka(x.flatten(1).T, y.flatten(1).T)
    loss = loss + pcka.patch_gram(x, patch_size=4).sum()
loss.backward()
print(pcka.build_info()["extension"], loss.item(), x.grad.norm().item())
"""


HIDDEN = """
import ctypes
def no_library(path, *rest, **more):
    raise OSError(path)
ctypes.CDLL = no_library
"""


def test_what_is_required_and_missing_is_an_error_at_import():
    result = run_python("import torch" + HIDDEN + "import pcka", check=False, PCKA_REQUIRE="cpu")
    assert result.returncode != 0
    assert "PCKA_REQUIRE=cpu: the compiled operators are not in use on cpu" in result.stderr
    result = run_python("import pcka", check=False, PCKA_REQUIRE="gpu")
    assert "PCKA_REQUIRE must be cpu or cuda, got 'gpu'" in result.stderr


STALE = "import torch\ntorch.ops.load_library = lambda path: None\n"  # as if of other operators


@needs_extension
def test_operators_of_other_sources_are_not_used():
    result = run_python(STALE + "import pcka" + RESULT)
    assert result.stdout.startswith("False")
    assert result.stderr.count("compiled from different sources; reinstall") == 1
    result = run_python(STALE + "import pcka", check=False, PCKA_REQUIRE="cpu")
    assert "PCKA_REQUIRE=cpu: the compiled operators are not in use on cpu" in result.stderr


@needs_extension
def test_what_is_required_and_there_imports():
    assert run_python("import pcka", PCKA_REQUIRE="cpu").stderr == ""


def test_without_the_extension_the_reference_gives_the_same_and_says_so_once():
    fallback = run_python("import torch" + HIDDEN + "import pcka" + RESULT)
    assert fallback.stderr.count("Falling back to the eager PyTorch reference") == 1
    assert "they were not compiled" in fallback.stderr
    loaded, loss, norm = fallback.stdout.split()
    assert loaded == "False"
    if pcka.build_info()["extension"]:
        compiled = run_python("import torch, pcka" + RESULT)
        assert compiled.stderr == ""
        assert compiled.stdout.startswith("True")
        for ours, theirs in zip(compiled.stdout.split()[1:], (loss, norm)):
            assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.skipif(not pcka.build_info()["cuda"], reason="no CUDA code was compiled")
@pytest.mark.parametrize(("runtime", "words"), [("'11.8'", "has CUDA 11.8"), (None, "CPU build")])
def test_cuda_operators_stay_away_from_another_cuda_major(runtime, words):
    code = f"import torch; torch.version.cuda = {runtime}\nimport pcka; print(pcka.build_info())"
    info = eval(run_python(code).stdout)  # our own dict, printed above
    assert info["extension"] and not info["cuda_loaded"]
    assert words in info["fallback"]["cuda"]
    assert info["cuda_version"] in info["fallback"]["cuda"]


OWN = {"pcka", "classification", "detection", "benchmarks", "tools"}
ELSEWHERE = {"detectron2", "omegaconf"}  # by tools/install_detectron2.py


def imported(path: Path) -> set[str]:
    """Top-level names of what a module imports, anywhere in it, beyond Python and this project."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module))
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - OWN - ELSEWHERE


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("pcka", []),
        ("pcka/engine", ["train"]),
        ("classification", ["train"]),
        ("benchmarks", ["train"]),
        ("detection", ["train", "detection"]),
        ("tools", ["train", "detection"]),
    ],
)
def test_every_import_is_declared(folder, extras):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"]]
    for extra in extras:
        stated += project["optional-dependencies"][extra]
    declared = {Requirement(text).name.lower().replace("-", "_") for text in stated}
    distributions = metadata.packages_distributions()
    inner = "pcka/engine" if folder == "pcka" else "none"  # has a row of its own
    modules = [path for path in (ROOT / folder).rglob("*.py") if inner not in str(path)]
    for name in set().union(*map(imported, modules)):
        known = {d.lower().replace("-", "_") for d in distributions.get(name, [name])}
        assert known & declared, f"{folder} imports {name}, and pyproject.toml has no {known}"
