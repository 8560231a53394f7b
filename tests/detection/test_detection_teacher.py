"""The teacher's backbone: what it runs, and what it is given."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from detection.config import teacher_config
from detection.data import register_datasets
from detection.data.targets import training_set
from detection.preflight import check_teacher_file
from detection.teacher import TeacherBackbone, build_teacher, fold_batch_norms
from detection.teacher_checks import check_features
from pcka.engine.config import ConfigError
from pcka.teacher import FrozenTeacher

SMALL_TEACHER = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 32]


@pytest.fixture
def backbone(small_config):
    """``backbone(norm)``: a trained teacher's backbone would be like it, statistics and all."""

    def make(norm):
        own = ["MODEL.RESNETS.NORM", norm]
        wanted = small_config("pcka", "DISTILL.TEACHER.OPTS", str([*SMALL_TEACHER, *own]))
        torch.manual_seed(0)
        built = build_backbone(teacher_config(wanted)).eval()
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_(std=0.1)
        return built

    return make


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_folded_batch_norms_give_the_same_features(backbone, norm):
    whole = backbone(norm)
    folded = fold_batch_norms(copy.deepcopy(whole))
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {nn.BatchNorm2d, FrozenBatchNorm2d}
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = whole(images), folded(images)
    for level, feature in expected.items():
        assert feature.std() > 0
        torch.testing.assert_close(found[level], feature, rtol=1e-4, atol=1e-4 * feature.std())


def test_other_norms_stay_where_they_are(backbone):
    model = nn.Sequential(
        Conv2d(3, 4, 1, norm=nn.GroupNorm(2, 4)),
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4, track_running_stats=False)),
    )
    fold_batch_norms(model)
    assert [type(conv.norm) for conv in model] == [nn.GroupNorm, nn.BatchNorm2d]


def test_a_teacher_folds_its_batch_norms_and_is_frozen(backbone):
    teacher = FrozenTeacher(TeacherBackbone(backbone("FrozenBN"), [0.0] * 3, [1.0] * 3))
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_what_lies_beyond_the_students_images_is_cut_off(backbone):
    teacher = FrozenTeacher(TeacherBackbone(backbone("BN"), [0.0] * 3, [1.0] * 3))
    image = torch.randint(256, (3, 40, 72), dtype=torch.uint8)
    whole, cut = teacher([image], (64, 96)), teacher([image], (40, 72))
    assert {level: tuple(feature.shape[2:]) for level, feature in cut.items()} == {
        "p3": (5, 9), "p4": (3, 5), "p5": (2, 3), "p6": (1, 2), "p7": (1, 1),
    }  # fmt: skip
    assert all(torch.equal(cut["p3"], whole["p3"][:, :, :5, :9]) for level in cut)


def test_channels_last_gives_the_same_maps(backbone):
    statistics = [0.0] * 3, [1.0] * 3
    whole, images = backbone("BN"), [torch.randint(256, (3, 64, 64), dtype=torch.uint8)]
    plain = FrozenTeacher(TeacherBackbone(copy.deepcopy(whole), *statistics))
    other = FrozenTeacher(TeacherBackbone(whole, *statistics, channels_last=True))
    maps = other(images, (64, 64))
    assert maps["p3"].is_contiguous(memory_format=torch.channels_last)
    for level, feature in plain(images, (64, 64)).items():
        torch.testing.assert_close(maps[level], feature, rtol=1e-3, atol=1e-3 * feature.std())


class _CountsUploads(Tensor):
    """An image that counts how often it is brought to a device as it came from the loader."""

    uploads = 0

    def to(self, *args, **kwargs):
        _CountsUploads.uploads += 1
        return self.as_subclass(Tensor).to(*args, **kwargs)


def test_an_image_travels_to_the_device_once_for_both_models(build, batch, storage):
    model = build().train()
    expected = model(batch)
    counted = [{**x, "image": x["image"].as_subclass(_CountsUploads)} for x in batch]
    terms = model(counted)
    assert _CountsUploads.uploads == len(batch)
    assert expected.keys() == terms.keys()
    torch.testing.assert_close(terms["loss_pcka_p3_rows"], expected["loss_pcka_p3_rows"])


def _save(backbone, path, change=lambda state: None):
    state = {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}
    with torch.no_grad():
        change(state)
    torch.save({"model": state}, path)
    return str(path)


def _zero(state):
    for name, value in state.items():
        if "running" not in name:
            value.zero_()
    state["backbone.fpn_output3.norm.bias"].fill_(1.0)


def _flip_a_bit(state):
    state["backbone.fpn_output4.weight"].view(-1)[0] = 1e30


def _overflow(state):
    state["backbone.fpn_output4.weight"].fill_(3e38)


@pytest.fixture
def checked(small_config, backbone, tmp_path):
    """``checked(change, *overrides)``: build a teacher of changed weights, and run it."""

    def make(change, *overrides):
        path = _save(backbone("BN"), tmp_path / "taught.pth", change)
        given = ("DISTILL.TEACHER.WEIGHTS", path, "DISTILL.TEACHER.RANDOM_WEIGHTS", "False")
        cfg = small_config("pcka", *given, *overrides)
        register_datasets(cfg)
        check_features(build_teacher(cfg), cfg, training_set(cfg))

    return make


def test_a_trained_teacher_passes(checked):
    checked(lambda state: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_zero, "maps of p3 are the same for every image, .*"),
        (_overflow, "maps of p4 are not finite"),
        (_flip_a_bit, r"maps of p4 reach \de\+\d+, unlike those of a trained model"),
    ],
)
def test_a_teacher_with_nothing_to_teach_is_refused(checked, change, message):
    named = r"DISTILL.TEACHER.WEIGHTS: .*taught\.pth: the teacher's"
    with pytest.raises(ConfigError, match=f"{named} {message}; is the file complete"):
        checked(change)


def test_a_teacher_of_nan_is_refused(checked):
    nan = lambda state: state["backbone.fpn_output3.weight"].fill_(torch.nan)  # noqa: E731
    with pytest.raises(
        ConfigError, match=r"DISTILL.TEACHER.WEIGHTS: .*taught\.pth: 1 of its .*NaN"
    ):
        checked(nan)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("PIXEL_MEAN", [1e4] * 3),
        ("PIXEL_MEAN", [-1.0] * 3),
        ("PIXEL_STD", [1e-3] * 3),
        ("PIXEL_STD", [0.229] * 3),
        ("PIXEL_STD", [0.0] * 3),
    ],
)
def test_statistics_that_are_not_of_pixels_are_refused(checked, key, values):
    opts = [*SMALL_TEACHER, f"MODEL.{key}", values]
    with pytest.raises(ConfigError, match=rf"the teacher's MODEL.{key}: expected values from"):
        checked(lambda state: None, "DISTILL.TEACHER.OPTS", str(opts))


@pytest.mark.parametrize("norm", ["BN", "GN", "FrozenBN"])
def test_an_untrained_teacher_has_to_be_asked_for(small_config, tmp_path, norm):
    opts = str([*SMALL_TEACHER, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", norm])
    cfg = small_config("pcka", "DISTILL.TEACHER.OPTS", opts)
    path = _save(build_backbone(teacher_config(cfg)), tmp_path / "untrained.pth")
    given = ("DISTILL.TEACHER.OPTS", opts, "DISTILL.TEACHER.WEIGHTS", path)
    build_teacher(small_config("pcka", *given))  # which allows it
    with pytest.raises(
        ConfigError, match=r"untrained\.pth: holds the weights of an .*RANDOM_WEIGHTS True"
    ):
        build_teacher(small_config("pcka", *given, "DISTILL.TEACHER.RANDOM_WEIGHTS", "False"))


def test_a_student_that_starts_as_its_own_teacher_is_told(small_config, tmp_path, caplog):
    file = str(tmp_path / "both.pth")
    check_teacher_file(small_config("pcka", "DISTILL.TEACHER.WEIGHTS", file))
    assert not caplog.text
    keys = ("DISTILL.TEACHER.WEIGHTS", file, "MODEL.WEIGHTS", file)
    check_teacher_file(small_config("pcka", *keys))
    assert "the student starts as its own teacher" in caplog.text
