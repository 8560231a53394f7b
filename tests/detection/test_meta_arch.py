from __future__ import annotations

import copy

import pytest
import torch
from detectron2.solver import build_optimizer
from detectron2.structures import ImageList

from detection.levels import _unfit
from detection.teacher import TeacherBackbone
from pcka import losses
from pcka.engine.config import ConfigError

LEVELS = ("p3", "p4", "p5")
FEATURE_METHODS = [
    loss
    for loss in losses.names()
    if not losses.find(loss).needs_head and not _unfit(losses.build(loss))
]


def _total(terms):
    return sum(terms.values())


def test_terms_of_the_student_and_of_every_level(build, batch, storage):
    model = build().train()
    terms = model(batch)
    distilled = {f"loss_pcka_{level}_rows" for level in LEVELS}
    assert set(terms) == {"loss_cls", "loss_box_reg"} | distilled
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(0 < terms[name] <= 1 for name in distilled)


def test_every_level_sends_a_gradient_and_logs_it(build, batch, storage):
    model = build("DISTILL.LOG_PERIOD", "1").train()
    terms = model(batch)
    _total({name: term for name, term in terms.items() if "pcka" in name}).backward()
    logged = storage.latest()
    for level in LEVELS:
        assert logged[f"distill_grad/{level}"][0] > 0
        assert 0 <= logged[f"cka/{level}"][0] <= 1
        # Their own step's values are written, not a median of the last ones.
        assert not storage.smoothing_hints()[f"distill_grad/{level}"]
        assert not storage.smoothing_hints()[f"cka/{level}"]
    lateral = model.student.backbone.fpn_lateral3.weight.grad
    assert lateral.norm() > 0


def test_inference_is_exactly_the_student(build, batch):
    model = build().eval()
    with torch.no_grad():
        whole, alone = model(batch), model.student(batch)
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
        assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)


def test_the_teacher_is_in_neither_state_nor_parameters(build):
    model = build()
    own = {id(parameter) for parameter in model.teacher.parameters()}
    assert own
    assert not own & {id(parameter) for parameter in model.parameters()}
    assert all(name.startswith("distiller.student.") for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_the_teacher_stays_as_it_is_while_the_student_learns(build, small_config, batch, storage):
    model = build().train()
    before = copy.deepcopy(model.teacher.state_dict())
    student = copy.deepcopy(model.student.state_dict())
    optimizer = build_optimizer(small_config("pcka"), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(2):
        optimizer.zero_grad()
        _total(model(batch)).backward()
        optimizer.step()
    assert not model.teacher.training
    after = model.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(
        student["head.cls_score.bias"], model.student.state_dict()["head.cls_score.bias"]
    )


def test_the_distillation_loss_falls_on_one_batch(build, batch, storage):
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        terms = model(batch)
        loss = sum(term for name, term in terms.items() if "pcka" in name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_features_are_the_same_alone_and_inside(build, batch):
    model = build()
    alone = copy.deepcopy(model.teacher.model.backbone).eval()
    pixels = [
        (x["image"] - model.teacher.model.pixel_mean) / model.teacher.model.pixel_std for x in batch
    ]
    images = ImageList.from_tensors(pixels, alone.size_divisibility).tensor
    inside = model.teacher([x["image"] for x in batch], tuple(images.shape[-2:]))
    with torch.no_grad():
        expected = alone(images)
    assert expected.keys() == inside.keys()
    assert all(torch.equal(expected[level], inside[level]) for level in expected)


def test_an_rgb_teacher_sees_rgb_whatever_the_student_sees(build, batch):
    rgb = str(["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [10.0, 20.0, 30.0]])
    model = build("DISTILL.TEACHER.OPTS", rgb)
    assert model.teacher.model.swap_channels  # the student's loader gives BGR
    seen = []
    model.teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = batch[0]["image"]
    model.teacher([image], (128, 96))
    mean = torch.tensor([10.0, 20.0, 30.0]).view(-1, 1, 1)
    expected = (image.float()[[2, 1, 0]] - mean) / model.teacher.model.pixel_std
    torch.testing.assert_close(seen[0][0, :, :128, :96], expected)


def test_a_wider_teacher_gets_an_adapter_that_learns(build, batch, storage):
    model = build("DISTILL.TEACHER.OPTS", str(["MODEL.FPN.OUT_CHANNELS", 64])).train()
    assert {
        level: tuple(conv.weight.shape) for level, conv in model.distiller.adapters.items()
    } == {level: (64, 32, 1, 1) for level in LEVELS}
    _total(model(batch)).backward()
    assert all(conv.weight.grad.norm() > 0 for conv in model.distiller.adapters.values())


def test_the_dry_run_gives_every_module_its_own_mode_back(build, monkeypatch):
    model = build().train()
    frozen = next(m for m in model.student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen.eval()
    before = [module.training for module in model.student.modules()]
    model._prepare()
    assert [module.training for module in model.student.modules()] == before

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.student.backbone, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model._prepare()
    assert [module.training for module in model.student.modules()] == before


def test_only_what_a_loss_reads_is_matched_and_adapted(build):
    """A convolution without a gradient would stop several processes at their second step."""
    wide = str(["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 48])
    one = ("DISTILL.PCKA.STAGES", "['p3']", "DISTILL.PCKA.PATCH_SIZES", "[4]")
    model = build("DISTILL.TEACHER.OPTS", wide, *one)
    assert list(model.distiller.adapters) == list(model.distiller.teacher_paths) == ["p3"]


def test_a_teacher_of_another_stride_is_resized(build, batch, storage):
    levels = ("DISTILL.LEVELS", "['p3:p4', 'p4:p3']", "DISTILL.PCKA.PATCH_SIZES", "[4]")
    terms = build(*levels).train()(batch)
    assert {name for name in terms if "pcka" in name} == {
        "loss_pcka_p3_rows", "loss_pcka_p4_rows"
    }  # fmt: skip


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_every_loss_of_feature_maps_with_a_teacher_of_another_width_and_stride(
    build, batch, storage, method
):
    """A level of the student beside a coarser one and a finer one of the teacher, twice as wide."""
    wide = ("DISTILL.TEACHER.OPTS", str(["MODEL.FPN.OUT_CHANNELS", 64]))
    levels = ("DISTILL.LEVELS", "['p3:p4', 'p4:p3']", "DISTILL.PCKA.PATCH_SIZES", "4")
    if method == "REVIEWKD":  # which takes its coarsest level by a key of its own
        levels += ("DISTILL.REVIEWKD.STAGES", "['p3']", "DISTILL.REVIEWKD.POOLED", "p4")
    if method == "ITRD":  # of one place, the classifier's input by default
        levels += ("DISTILL.ITRD.STAGE", "p3")
    model = build("DISTILL.METHODS", str([method]), *wide, *levels).train()
    three = [*batch, batch[0]]  # FCKA of two samples is constantly 1
    terms = {name: term for name, term in model(three).items() if method.lower() in name}
    assert terms
    _total(terms).backward()
    backbone = model.student.backbone
    assert backbone.fpn_lateral3.weight.grad.norm() > 0
    parts = [*model.distiller.adapters.parameters(), *model.distiller.losses.parameters()]
    assert all(parameter.grad is not None for parameter in parts)


def test_a_loss_that_needs_more_images_in_each_process_is_refused(build, monkeypatch):
    keys = ("DISTILL.METHODS", "['FCKA']", "DISTILL.FCKA.UNBIASED", "True")
    build(*keys, "SOLVER.IMS_PER_BATCH", "4")
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    told = "FCKA compares at least 4 images at a time, but SOLVER.IMS_PER_BATCH gives it 3"
    with pytest.raises(ConfigError, match=rf"^DISTILL.METHODS: {told}"):
        build(*keys, "SOLVER.IMS_PER_BATCH", "6")


def test_two_methods_add_up(build, batch, storage):
    terms = build("DISTILL.METHODS", "['PCKA', 'PKD', 'CWD']").train()(batch)
    assert {name.split("_")[1] for name in terms} == {"cls", "box", "pcka", "pkd", "cwd"}


def test_adapters_of_the_losses_are_trained(build, batch, storage):
    model = build("DISTILL.METHODS", "['FITNET', 'VID', 'CC', 'KDSVD']").train()
    _total(model(batch)).backward()
    fitnet, vid, cc, kdsvd = ([*loss.parameters()] for loss in model.distiller.losses)
    assert not fitnet and not kdsvd  # both maps have one shape already
    assert vid and cc
    assert all(parameter.grad.norm() > 0 for parameter in vid + cc)


@pytest.mark.parametrize("method", ["at", "kl", "pkd", "dist"])
def test_other_comparisons_of_pckas_patches(build, batch, storage, caplog, method):
    chosen = ("DISTILL.METHODS", "['PATCHED']", "DISTILL.PATCHED.METHOD", method)
    with caplog.at_level("WARNING", logger="detectron2.pcka"):
        model = build(*chosen).train()
    assert "PATCH_SIZES" not in caplog.text  # a single patch still has something to compare
    terms = {name: term for name, term in model(batch).items() if "patched" in name}
    assert set(terms) == {f"loss_patched_{method}_{level}" for level in LEVELS}
    _total(terms).backward()
    for level in (3, 4, 5):
        lateral = getattr(model.student.backbone, f"fpn_lateral{level}")
        assert lateral.weight.grad.norm() > 0


def test_bfloat16_teacher_serves_a_float32_student(build, batch, storage):
    exact = build().train()(batch)
    rounding = build("DISTILL.TEACHER.AUTOCAST", "bfloat16").train()
    maps = rounding.teacher([entry["image"] for entry in batch], (128, 128))
    assert {feature.dtype for feature in maps.values()} == {torch.bfloat16}
    rounded = rounding(batch)
    for level in LEVELS:
        name = f"loss_pcka_{level}_rows"
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("given", "dtype"), [("", torch.bfloat16), ("float32", torch.float32)])
def test_the_teacher_runs_in_the_students_precision_unless_told(build, batch, given, dtype):
    teacher = build("DISTILL.TEACHER.AUTOCAST", given).teacher
    images = [entry["image"] for entry in batch]
    for student, expected in ((torch.bfloat16, dtype), (torch.float32, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=student == torch.bfloat16):
            maps = teacher(images, (128, 128))
        assert {feature.dtype for feature in maps.values()} == {expected}


def test_moves_take_the_teacher_along(build):
    assert build().double().teacher.model.pixel_mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("DISTILL.LEVELS", "['p2']"), r"'p2', which the student's backbone does not have.*p3"),
        (("DISTILL.LEVELS", "['p3:p9']"), r"'p9', which the teacher's backbone does not have"),
        (("DISTILL.LEVELS", "['p3', 'p3:p4']"), r"'p3' appears twice"),
        (("DISTILL.LEVELS", "[3]"), r"DISTILL.LEVELS expects a str .*got 3"),
        (("DISTILL.PCKA.PATCH_SIZES", "[4.5, 4, 2]"), r"PCKA.PATCH_SIZES expects a int"),
        (("DISTILL.PCKA.WEIGHTS", "[-1.0]"), r"DISTILL.PCKA: .*weight"),
        (("DISTILL.METHODS", "['PKDA']"), r"METHODS: unknown loss 'PKDA'; near matches: PKD"),
        (
            ("DISTILL.METHODS", "['KD']"),
            r"METHODS: KD needs logits, but .* feature maps and heads",
        ),
        (
            ("DISTILL.PCKA.STAGES", "['p6']", "DISTILL.PCKA.PATCH_SIZES", "4"),
            r"DISTILL.PCKA: p6 is not tapped; available: p3, p4, p5; add more in DISTILL.LEVELS",
        ),
        (("DISTILL.PCKA.WEIGHTS", "[1.0, 2.0]"), r"DISTILL.PCKA: weights must hold one"),
        (
            ("DISTILL.METHODS", "['PATCHED']", "DISTILL.PATCHED.METHOD", "cka"),
            r"DISTILL.PATCHED: method must be one of at, kl, pkd, dist; got 'cka'",
        ),
        (("DISTILL.METHODS", "['PCKA', 'PCKA']"), r"METHODS: expected each loss once"),
        (("DISTILL.METHODS", "['OFD']"), r"METHODS: OFD needs more from the teacher"),
        (("DISTILL.PCKA.PATCH_SIZES", "[0]"), r"DISTILL.PCKA: patch_size must be a positive int"),
        (("DISTILL.PCKA.RELATIONS", "[]"), r"DISTILL.PCKA: relations must hold one or more"),
        (("DISTILL.PCKA.RELATIONS", "['row']"), r"DISTILL.PCKA: relations must be one of rows"),
        (("DISTILL.PCKA.GROUP_BY", "chan"), r"DISTILL.PCKA: group_by must be one of channel"),
        (("DISTILL.STUDENT", ""), r"DISTILL.STUDENT: expected a meta-architecture"),
        (("INPUT.FORMAT", "L"), r"INPUT.FORMAT: 'L' of the student and 'BGR' of the teacher"),
        (
            ("DISTILL.TEACHER.OPTS", "['MODEL.BACKBONE.NAME', 'nope']"),
            r"the teacher's MODEL.BACKBONE.NAME: unknown 'nope'; registered: .*resnet_fpn",
        ),
        (
            ("MODEL.BACKBONE.NAME", "build_p6p7_resnet_fpn_backbone"),
            r"MODEL.BACKBONE.NAME: plain detectron2 does not know 'build_p6p7.*of its own",
        ),
        (
            ("DISTILL.TEACHER.RANDOM_WEIGHTS", "False"),
            r"DISTILL.TEACHER.WEIGHTS: expected a file",
        ),
        (("DISTILL.TEACHER.CONFIG_FILE", ""), r"TEACHER.CONFIG_FILE: '' is neither a file nor"),
        (("DISTILL.TEACHER.CONFIG_FILE", "x.yaml"), r"'x.yaml' is neither a file nor a name"),
        (("DISTILL.TEACHER.AUTOCAST", "half"), r"AUTOCAST: expected one of .*, got 'half'"),
        (("DISTILL.TEACHER.WEIGHTS", "/nowhere.pth"), r"TEACHER.WEIGHTS: /nowhere.pth: cannot"),
        (
            ("DISTILL.TEACHER.WEIGHTS", "model_zoo"),
            r"DISTILL.TEACHER.WEIGHTS: the model zoo has none",
        ),
    ],
)
def test_refusals(build, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*overrides)


def test_levels_without_a_signal_are_named_with_the_patch_that_has_one(build, caplog):
    with caplog.at_level("WARNING", logger="detectron2.pcka"):
        build("DISTILL.PCKA.PATCH_SIZES", "[16]")
    assert "level p3 (stride 8) has 1 patch(es) of size 16" in caplog.text
    assert "a patch of 4 would leave 16" in caplog.text


@pytest.mark.parametrize(
    "keys",
    [
        ("PATCH_SIZES", "[[16, 1], [8, 1], [4, 1]]"),
        ("PATCH_SIZES", "[16]", "RELATIONS", "['columns']"),
        ("PATCH_SIZES", "[[16, 8], [8, 4], [4, 2]]", "CENTER", "False"),
    ],
)
def test_levels_with_a_signal_are_not_warned_of(build, caplog, keys):
    with caplog.at_level("WARNING", logger="detectron2.pcka"):
        build(*(word if i % 2 else f"DISTILL.PCKA.{word}" for i, word in enumerate(keys)))
    assert "PATCH_SIZES" not in caplog.text


def test_weights_of_another_model_are_refused(build, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"backbone.something": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"other.pth: \d+ of \d+ weights are missing.*describe"):
        build("DISTILL.TEACHER.WEIGHTS", str(path))


def test_two_losses_of_one_name_are_refused(build, batch, storage):
    model = build().train()
    model.distiller.losses.append(model.distiller.losses[0])
    with pytest.raises(
        ValueError, match=r"gives loss_pcka_p3_rows, .* as another loss already does"
    ):
        model(batch)


def test_a_loss_that_takes_a_name_of_the_students_is_refused(build, batch, storage, monkeypatch):
    model = build("DISTILL.METHODS", "['PKD']").train()
    student = model.student.forward
    monkeypatch.setattr(
        model.student, "forward", lambda x: {**student(x), "loss_pkd_p4": torch.zeros(())}
    )
    with pytest.raises(ConfigError, match="a loss and the student both give loss_pkd_p4"):
        model(batch)


def test_the_teacher_never_goes_to_training_mode(build):
    teacher = build().teacher
    assert isinstance(teacher.train().model, TeacherBackbone)
    assert not any(module.training for module in teacher.modules())
