from __future__ import annotations

import json
import zipfile

import pytest

from tools import gpu_bundle
from tools.gpu import bundle


def test_data_sets_are_packed_and_found_again(tmp_path, monkeypatch):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "deep" / "a.txt").write_text("a")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("b.txt", "b")
    packed = tmp_path / "bundle"
    gpu_bundle.data(packed / "data", [tmp_path / "images", tmp_path / "packed.zip"])
    found = bundle.unpack(packed, tmp_path / "work")
    assert found == {
        "PYTHONPATH": str(tmp_path / "work" / "site"),
        "PCKA_GPU_DATA": str(tmp_path / "work" / "data"),
    }
    assert (tmp_path / "work/data/images/deep/a.txt").read_text() == "a"
    assert (tmp_path / "work/data/packed/b.txt").read_text() == "b"


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(SystemExit, match=r"--data .*file.txt: expected a folder or a zip"):
        gpu_bundle.data(tmp_path / "data", [tmp_path / "file.txt"])


def test_libraries_and_wheels_are_put_in_their_places(tmp_path, monkeypatch):
    packed, root = tmp_path / "bundle", tmp_path / "checkout"
    (packed / "wheels").mkdir(parents=True)
    (root / "pcka").mkdir(parents=True)
    (root / "pcka" / "_cpu.abi3.so").write_text("old")
    (packed / "_cpu.abi3.so").write_text("new")
    with zipfile.ZipFile(packed / "wheels" / "some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/__init__.py", "x = 1")
    monkeypatch.setattr(bundle, "ROOT", root)
    found = bundle.unpack(packed, tmp_path / "work")
    assert sorted(path.name for path in (root / "pcka").iterdir()) == ["_cpu.abi3.so"]
    assert (root / "pcka" / "_cpu.abi3.so").read_text() == "new"
    assert (tmp_path / "work/site/some/__init__.py").exists()
    assert set(found) == {"PYTHONPATH"}


def test_what_is_no_bundle_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest.json there; run make gpu-bun"):
        bundle.manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": "abc"}))
    assert bundle.manifest(tmp_path)["commit"] == "abc"


def test_detectron2_is_packed_with_its_configurations_and_without_caches(tmp_path):
    pytest.importorskip("detectron2")
    gpu_bundle.detectron2(tmp_path / "detectron2.zip")
    names = zipfile.ZipFile(tmp_path / "detectron2.zip").namelist()
    config = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    assert {"detectron2/__init__.py", f"detectron2/model_zoo/configs/{config}"} <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".so"))]
