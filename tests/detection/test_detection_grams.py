"""``pcka grams`` of a detector's run: the patches of its levels beside the teacher's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model

from detection import grams
from detection.config import load_config
from detection.data import register_datasets
from pcka import cli
from pcka.engine.config import ConfigError

PATCHES = {"p3": 4, "p4": 4, "p5": 2}  # of the run's PCKA, in pixels of the map


@pytest.fixture(scope="module")
def cfg(taught_run):
    cfg = load_config(str(taught_run / "config.yaml"), [])
    register_datasets(cfg, training=False)
    return cfg


@pytest.fixture(scope="module")
def maps(taught_run, cfg):
    """Level -> maps of student, behind its adapter, and teacher, of the first test image."""
    content = torch.load(taught_run / "model_final.pth", weights_only=True)
    model = build_model(cfg)
    model.student.load_state_dict(content["model"])
    model.distiller.adapters.load_state_dict(content["adapters"])
    model.double().eval()
    entry = next(iter(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]
    with torch.no_grad():
        pixels = (entry["image"].double() - 127.5) / 64
        student = model.student.backbone(pixels[None])
        teacher = model.teacher.model.backbone(pixels[None])
        adapters = model.distiller.adapters
        return {
            level: [
                m.numpy()
                for m in (
                    adapters[level](student[level]) if level in adapters else student[level],
                    teacher[level],
                )
            ]
            for level in PATCHES
        }


def unit_grams(x: np.ndarray, patch: int) -> np.ndarray:
    """``(1, C, H, W)`` whose sides are multiples of the patch -> ``(C, N, N)`` of unit norm."""
    _, channels, height, width = x.shape
    cut = x.reshape(channels, height // patch, patch, width // patch, patch)
    rows = cut.transpose(0, 1, 3, 2, 4).reshape(channels, -1, patch * patch)
    rows = rows - rows.mean(1, keepdims=True)
    products = rows @ rows.transpose(0, 2, 1)
    return products / np.linalg.norm(products, axis=(1, 2), keepdims=True)


def test_the_values_of_the_command_are_numpys_on_the_maps_that_the_loss_sees(
    taught_run, maps, tmp_path, capsys
):
    pairs = cli.main(["grams", str(taught_run), "--output", str(tmp_path / "of" / "run")])
    assert list(pairs) == list(PATCHES)
    told = capsys.readouterr().out
    for level, patch in PATCHES.items():
        own, other = (unit_grams(x, patch) for x in maps[level])
        pair = pairs[level]
        np.testing.assert_allclose(pair.student, own.mean(0), atol=1e-4)
        np.testing.assert_allclose(pair.teacher, other.mean(0), atol=1e-4)
        assert pair.cka == pytest.approx((own * other).sum((1, 2)).mean(), abs=1e-4)
        assert f"{level}: CKA {pair.cka:.4f} of {len(own[0])} patches" in told
    assert (tmp_path / "of" / "run.png").stat().st_size > 20_000
    with np.load(tmp_path / "of" / "run.npz") as values:
        assert np.array_equal(values["p4.student"], pairs["p4"].student)


def test_a_channel_several_images_and_another_patch(taught_run, cfg, maps):
    found = grams.level_grams(
        cfg, taught_run / "model_final.pth", levels=["p3"], images=2, patch_size=8, channel=3
    )
    assert list(found.pairs) == ["p3 of image 1", "p3 of image 2"]
    first = found.pairs["p3 of image 1"]
    own = unit_grams(maps["p3"][0][:, 3:4], 8)
    np.testing.assert_allclose(first.student, own[0], atol=1e-4)
    assert first.alignment.shape == (1,) and first.grid == (2, 2)
    image = found.images["p3 of image 1"]
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8 and image.std() > 10


def test_an_image_smaller_than_its_canvas_is_drawn_on_white():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    image[0] = 200  # blue
    shown = grams._on_canvas(image, (32, 32), "BGR")
    assert shown[5, 5].tolist() == [0, 0, 200] and shown[25, 5].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--taps", "p9"], "--taps: p9 is not tapped; available: p3, p4, p5"),
        (["--channel", "99"], "--channel: expected 0 to 39 for the level p3, got 99"),
        (["--patch-size", "64"], "--patch-size: p3, p4, p5 has too few patches"),
        (["--weights", "nowhere.pth"], "found no nowhere.pth; .* or --weights"),
    ],
)
def test_refusals_in_one_line(taught_run, words, message):
    with pytest.raises(ConfigError, match=message):
        cli.main(["grams", str(taught_run), *words])


def test_weights_without_the_adapters_of_the_run_are_refused(taught_run, cfg, tmp_path):
    content = torch.load(taught_run / "model_final.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"bare\.pth: holds no adapters of this configuration"):
        grams.level_grams(cfg, tmp_path / "bare.pth")


def test_runs_that_keep_no_teacher_are_refused(cfg, taught_run):
    weights = taught_run / "model_final.pth"
    for keys, message in (
        (["DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.RANDOM_WEIGHTS", True], "not kept"),
        (["DISTILL.METHODS", []], "learned without a teacher"),
    ):
        changed = cfg.clone()
        changed.merge_from_list(keys)
        with pytest.raises(ConfigError, match=message):
            grams.level_grams(changed, weights)
