from __future__ import annotations

import importlib

import pytest
from detectron2.engine import launch

from tools import install_detectron2
from tools.install_detectron2 import EXTENSION_STUB, REPAIRS, RepairError, repair


def _release(root):
    """A tree with one line for every repair, and nothing else."""
    lines = {
        "data/transforms/transform.py": "interp=Image.LINEAR, kind=np.bool\n",
        "model_zoo/model_zoo.py": (
            "import pkg_resources\n"
            'file = pkg_resources.resource_filename(\n    "detectron2.model_zoo", "configs")\n'
        ),
        "evaluation/coco_evaluation.py": "def f(use_fast_impl=True): pass\n",
        "modeling/meta_arch/retinanet.py": "get_norm(norm, 1)\n",
        "utils/collect_env.py": "import detectron2._C as _C\n",
    }
    for name, text in lines.items():
        path = root / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_repairs(tmp_path):
    package = _release(tmp_path) / "detectron2"
    repair(tmp_path)
    transform = (package / "data/transforms/transform.py").read_text()
    assert transform == "interp=Image.BILINEAR, kind=bool\n"
    zoo = (package / "model_zoo/model_zoo.py").read_text()
    assert zoo == 'file = os.path.join(os.path.dirname(__file__), "configs")\n'
    assert "use_fast_impl=False" in (package / "evaluation/coco_evaluation.py").read_text()
    assert "find_packages" in (tmp_path / "setup.py").read_text()


def test_a_release_that_is_not_the_expected_one_is_refused(tmp_path):
    _release(tmp_path)
    (tmp_path / "detectron2/data/transforms/transform.py").write_text("np.bool\n")
    with pytest.raises(RepairError, match=r"transform.py: expected .*Image.*Pillow 10"):
        repair(tmp_path)


def test_every_repair_has_a_reason():
    assert all(len(item.reason) > 10 for item in REPAIRS)


def test_the_missing_extension_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "stub_of_extension.py").write_text(EXTENSION_STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    stub = importlib.import_module("stub_of_extension")
    with pytest.raises(RuntimeError, match=r"nms_rotated.*no C\+\+ extension.*official"):
        stub.nms_rotated  # noqa: B018
    assert not hasattr(stub, "__path__")


def test_an_importable_detectron2_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(install_detectron2, "_pip", lambda *_: pytest.fail("pip was called"))
    install_detectron2.main([])
    assert "kept as is" in capsys.readouterr().out
    assert callable(launch)


def test_without_the_repository_the_release_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(install_detectron2.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(install_detectron2, "REPOSITORY", str(tmp_path / "no-repository"))
    called = []
    monkeypatch.setattr(install_detectron2, "install_release", lambda: called.append("release"))
    install_detectron2.main([])
    assert called == ["release"]


def test_help_installs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(install_detectron2.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(install_detectron2.subprocess, "run", _fail)
    with pytest.raises(SystemExit) as end:
        install_detectron2.main(["--help"])
    assert end.value.code == 0
    assert "Make detectron2 importable" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        install_detectron2.main(["--prefix", "x"])


def _fail(*_, **__):
    raise AssertionError("nothing may be installed")
