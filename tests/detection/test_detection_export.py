"""What an export writes, and where it may."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from detection import export
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
