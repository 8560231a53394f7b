"""What an export writes, and where it may."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from detection import export
from detection.config import PROJECT
from pcka.engine.config import ConfigError

POINTS = [
    "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "64",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "64",
    "MODEL.BACKBONE.NAME", "build_p6p7_resnet_fpn_backbone",
    "MODEL.FPN.P6P7.IN_FEATURE", "p5",
]  # fmt: skip


@pytest.fixture
def trained(small_config, tmp_path):
    """``trained(*overrides)``: a configuration, and the file of a student that it describes."""

    def make(*overrides):
        cfg = small_config("pcka", *overrides)
        student = META_ARCH_REGISTRY.get(cfg.DISTILL.STUDENT)(cfg)
        torch.save({"model": student.state_dict()}, tmp_path / "trained.pth")
        return cfg, str(tmp_path / "trained.pth")

    return make


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("left", ["config.yaml", "last_checkpoint", "metrics.json", "log.txt"])
def test_the_folder_of_a_run_stays_as_it_is(trained, tmp_path, left):
    cfg, weights = trained()
    run = tmp_path / "run"
    run.mkdir()
    (run / left).write_text(cfg.dump())
    before = _content(run)
    with pytest.raises(ConfigError, match=r"--output: .*holds a training run.*another folder"):
        export.export_student(cfg, weights, run)
    assert _content(run) == before


@pytest.mark.parametrize("name", ["student.onnx", "student.pth", "there"])
def test_a_file_is_refused_as_a_folder(trained, tmp_path, name):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(ConfigError, match=r"--output: expected a folder.*ONNX"):
        export.export_student(*trained(), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"trained.pth", "there"}


def test_a_later_export_leaves_no_configuration_of_the_older_one(trained, tmp_path):
    folder = tmp_path / "exported"
    fcos = ("DISTILL.STUDENT", "FCOS", *POINTS)
    gfl = ("DISTILL.STUDENT", "GFL", *POINTS, "MODEL.FPN.P6P7.RELU", "False")
    lazy, modules = "lazy_config.yaml", {"gfl_model.py", "pyramid.py"}
    for overrides, written in (
        ((), {"config.yaml"}),
        (gfl, {lazy, *modules}),
        (fcos, {lazy}),
        ((), {"config.yaml"}),
    ):
        export.export_student(*trained(*overrides), folder)
        assert {path.name for path in folder.iterdir()} == {"model.pth", *written}


def test_the_example_of_docs_detection_md_detects_by_an_export(trained, tmp_path, monkeypatch):
    export.export_student(*trained(), tmp_path / "exported")
    page = (PROJECT / "docs" / "detection.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"image": np.zeros((128, 128, 3), np.uint8)}
    exec(example, names)
    assert names["found"].has("pred_boxes")


PSP = [
    "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone",
    "MODEL.RESNETS.RES5_DILATION", "4",
    "MODEL.SEM_SEG_HEAD.NAME", "PSPHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4', 'res5']",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8",
    "MODEL.SEM_SEG_HEAD.NORM", "SyncBN",
]  # fmt: skip
PLAIN_SEGMENTER = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
folder, image, found = sys.argv[1:]
sys.path.insert(0, folder)
try:
    import dilated
except ModuleNotFoundError:
    pass
cfg = get_cfg()
cfg.merge_from_file(f"{folder}/config.yaml")
cfg.MODEL.DEVICE = "cpu"
scores = DefaultPredictor(cfg)(torch.load(image).permute(1, 2, 0).numpy())["sem_seg"]
assert not [name for name in sys.modules if name.partition(".")[0] in ("pcka", "detection")]
torch.save(scores, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], PSP], ids=["fpn", "psp"])
def test_plain_detectron2_gives_the_exported_segmenters_classes(small_config, tmp_path, keys):
    cfg = small_config("../digits_pixels/student", *keys)
    torch.manual_seed(0)
    student = META_ARCH_REGISTRY.get("SemanticSegmentor")(cfg).eval()
    torch.save({"model": student.state_dict()}, tmp_path / "trained.pth")
    folder = tmp_path / "exported"
    export.export_student(cfg, str(tmp_path / "trained.pth"), folder)
    names = {"model.pth", "config.yaml"} | ({"dilated.py"} if keys else set())
    assert {path.name for path in folder.iterdir()} == names
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    torch.save(image, tmp_path / "image.pt")
    files = [str(tmp_path / name) for name in ("image.pt", "found.pt")]
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_SEGMENTER, str(folder), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = student([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected)


def test_an_export_of_another_model_leaves_no_code_of_the_older_one(small_config, tmp_path):
    for keys in (PSP, []):
        cfg = small_config("../digits_pixels/student", *keys)
        student = META_ARCH_REGISTRY.get("SemanticSegmentor")(cfg)
        torch.save({"model": student.state_dict()}, tmp_path / "trained.pth")
        export.export_student(cfg, str(tmp_path / "trained.pth"), tmp_path / "out")
        assert (tmp_path / "out" / "dilated.py").exists() == bool(keys)
