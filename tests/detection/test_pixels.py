"""Heads that give a class for every pixel: what the losses are given of both models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch.nn import functional as F

from detection import teacher_checks, trainer
from detection.config import build_student, teacher_config
from detection.data import register_datasets
from detection.data.targets import training_set
from detection.pixels import PixelParts
from detection.preflight import check_run
from detection.teacher import TeacherDetector, build_teacher
from detection.teacher_checks import check_pixels, mean_iou
from pcka.engine.config import ConfigError
from pcka.losses import cwd_loss, ifvd_loss, pixel_cka_loss, pixel_kd_loss

FOLDER = "../digits_pixels"
METHODS = ("DISTILL.METHODS", "['PIXELKD', 'PIXELCWD', 'PIXELCKA', 'IFVD']")
DILATED = (
    "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.RESNETS.RES5_DILATION", "4",
    "MODEL.SEM_SEG_HEAD.NAME", "PSPHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4', 'res5']",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8", "MODEL.SEM_SEG_HEAD.NORM", "BN",
    "DISTILL.LEVELS", "['res4:p4', 'sem_seg']",
)  # fmt: skip
PANOPTIC = (
    "DISTILL.STUDENT", "PanopticFPN", "MODEL.MASK_ON", "True", "DISTILL.LEVELS", "['p3']",
    "MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']", "MODEL.RPN.IN_FEATURES", "['p2', "
    "'p3', 'p4', 'p5']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64]]",
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7",
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_HEADS.NAME",
    "StandardROIHeads", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
)  # fmt: skip


@pytest.fixture
def labelled(batch):
    """Two images of unlike sizes with the classes of their pixels, some without."""
    generator = torch.Generator().manual_seed(1)
    for entry in batch:
        size = entry["height"], entry["width"]
        entry["sem_seg"] = torch.randint(11, size, generator=generator)
        entry["sem_seg"][:5] = 255
    return batch


def _prepared(model, batch):
    """What both models are run on, and its canvas."""
    student = model.student
    images = [(x["image"] - student.pixel_mean) / student.pixel_std for x in batch]
    step = max(student.backbone.size_divisibility, 1)
    height, width = (-(-128 // step) * step for _ in range(2))
    canvas = torch.zeros(2, 3, height, width)
    labels = torch.full((2, height, width), -1)
    for slot, own, image, entry in zip(canvas, labels, images, batch):
        slot[:, : image.shape[1], : image.shape[2]] = image
        truth = entry["sem_seg"].masked_fill(entry["sem_seg"] == 255, -1)
        own[: truth.shape[0], : truth.shape[1]] = truth
    return canvas, labels


def _scores(model, images):
    seen = []
    handle = model.sem_seg_head.predictor.register_forward_hook(
        lambda _, given, logits: seen.extend((logits, given[0]))
    )
    model.sem_seg_head.layers(model.backbone(images))
    handle.remove()
    return seen


@pytest.mark.parametrize("student", [(), DILATED], ids=["fpn", "psp"])
def test_losses_are_given_what_both_heads_give(build, labelled, storage, student):
    """The student's dropout and batch norms are as in an evaluation, so that it can run again."""
    model = build(*student, *METHODS, config=f"{FOLDER}/pcka").train()
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()
    terms = model(labelled)
    images, labels = _prepared(model, labelled)
    own, features = _scores(model.student, images)
    teacher = model.teacher.model.detector
    with torch.no_grad():
        other, others = _scores(teacher, images)  # has the student's pixel statistics
    size = own.shape[2:]
    other, others = (F.adaptive_avg_pool2d(x, size) for x in (other, others))
    expected = {
        "loss_pixelkd": pixel_kd_loss(own, other),
        "loss_pixelcwd": 3 * cwd_loss(own, other, temperature=4.0),
        "loss_ifvd": 200 * ifvd_loss(features, others, labels, 11),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    relations = terms["loss_pixelcka_intra"] + terms["loss_pixelcka_inter"]
    torch.testing.assert_close(relations, pixel_cka_loss(own, other), rtol=1e-4, atol=1e-4)
    sum(terms.values()).backward()
    assert model.student.sem_seg_head.predictor.weight.grad.norm() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_head_is_a_level_of_losses_of_maps(build, labelled, storage):
    keys = ("DISTILL.METHODS", "['PCKA', 'CWD', 'PKD', 'MGD']", "DISTILL.LOG_PERIOD", "1")
    model = build(*DILATED, *keys, "DISTILL.PCKA.PATCH_SIZES", "[4]", config=f"{FOLDER}/pcka")
    terms = model.train()(labelled)
    for level in ("res4", "sem_seg"):
        names = (f"loss_pcka_{level}_rows", f"loss_cwd_{level}", f"loss_pkd_{level}")
        assert {*names, f"loss_mgd_{level}"} <= terms.keys()
    assert 0 <= storage.latest()["cka/sem_seg"][0] <= 1
    sum(terms[name] for name in terms if "sem_seg_rows" in name).backward()
    assert model.student.sem_seg_head.context.project[0].weight.grad.norm() > 0
    assert model.student.sem_seg_head.predictor.weight.grad is None


def test_the_teachers_scores_are_those_of_whole_maps(build, labelled, storage):
    """A pyramid's maps go together level by level, which maps cut to 100 pixels would not."""
    model = build(*DILATED, *METHODS, config=f"{FOLDER}/pcka")
    images = [entry["image"][:, :100, :90] for entry in labelled]
    found = model.teacher(images, (100, 90))
    assert found["head"].logits.shape[2:] == (25, 23)
    assert found["sem_seg"].shape[2:] == (25, 23)
    assert found["p5"].shape[2:] == (4, 3)
    padded = model.teacher(images, (128, 96))
    assert torch.equal(padded["head"].logits[:, :, :25, :23], found["head"].logits)


@pytest.mark.parametrize("student", [(), DILATED], ids=["fpn", "psp"])
def test_mixed_precision_trains_near_float32(build, labelled, storage, student):
    exact, mixed = (build(*student, *METHODS, config=f"{FOLDER}/pcka") for _ in range(2))
    trainer.train_in_bfloat16(mixed)
    found = []
    for model in (exact, mixed):
        torch.manual_seed(0)  # of what is dropped
        found.append(model.train()(labelled))
    expected, terms = found
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert abs(term - expected[name]) < 0.1 * expected[name] + 0.05, name
    sum(terms.values()).backward()
    gradients = [p.grad for p in mixed.parameters() if p.grad is not None]
    assert gradients
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in gradients)


def test_heads_alone_need_no_levels_of_one_name(build, labelled, storage):
    """The student's trunk has res4 and res5, the teacher's pyramid p2 to p5."""
    keys = (*DILATED, "DISTILL.LEVELS", "[]")
    model = build(*keys, "DISTILL.METHODS", "['PIXELKD']", config=f"{FOLDER}/pcka")
    assert {"loss_sem_seg", "loss_sem_seg_aux", "loss_pixelkd"} == model.train()(labelled).keys()
    with pytest.raises(
        ConfigError, match=r"DISTILL\.LEVELS: 'res2' names 'res2', which the teacher"
    ):
        build(*keys, "DISTILL.METHODS", "['PKD', 'PIXELKD']", config=f"{FOLDER}/pcka")


def test_a_panoptic_student_is_distilled_by_its_pixels(build, labelled, storage):
    for entry in labelled:
        size = entry["image"].shape[-2:]
        instances = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        entry["instances"] = instances
    keys = (*PANOPTIC, "DISTILL.METHODS", "['PCKA', 'PIXELKD']", "DISTILL.PCKA.PATCH_SIZES", "[4]")
    model = build(*keys, config=f"{FOLDER}/pcka")
    terms = model.train()(labelled)
    assert {"loss_sem_seg", "loss_rpn_cls", "loss_pixelkd", "loss_pcka_p3_rows"} <= terms.keys()
    assert terms["loss_pixelkd"].isfinite()


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        ("pcka", METHODS, r"PixelKD, .*: the student: RetinaNet gives no readable classes"),
        (f"{FOLDER}/pcka", ("DISTILL.METHODS", "['PIXELKD', 'CROSSKD']"), "heads of two kinds"),
        (f"{FOLDER}/pcka", ("DISTILL.METHODS", "['KD']"), "KD needs logits"),
        ("pcka", ("DISTILL.LEVELS", "['sem_seg']"), r"'sem_seg', which the student's backbone"),
        (
            f"{FOLDER}/pcka",
            (
                *METHODS,
                "DISTILL.LEVELS",
                "['p3']",
                "DISTILL.TEACHER.CONFIG_FILE",
                "configs/detection/digits/teacher.yaml",
            ),
            r"the teacher: RetinaNet gives no readable classes of pixels",
        ),
        (
            f"{FOLDER}/pcka",
            (*METHODS, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"),
            r"DISTILL: .*Give both models the same number of classes",
        ),
    ],
)
def test_models_without_comparable_classes_are_refused(build, config, keys, message):
    with pytest.raises(ConfigError, match=message):
        build(*keys, config=config)


def test_a_head_without_layers_is_refused():
    model = torch.nn.Module()
    model.sem_seg_head = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="gives no readable classes of pixels"):
        PixelParts(model)


@pytest.fixture
def tried(small_config, tmp_path, monkeypatch):
    """``tried(classify)``: the check of a teacher that gives pixels these classes."""

    def run(classify, *keys):
        cfg = small_config(f"{FOLDER}/pcka", *keys)
        register_datasets(cfg)
        dataset = training_set(cfg)
        asked = iter(dataset)
        monkeypatch.setattr(
            TeacherDetector, "classify", lambda self, image, *size: classify(next(asked), size)
        )
        check_pixels(build_teacher(cfg, with_head=True), cfg, dataset)

    return run


def _truth(entry, size):
    labels = np.asarray(Image.open(entry["sem_seg_file_name"]))
    return torch.from_numpy(labels.astype("int64"))


def test_a_teacher_that_guesses_is_refused(tried):
    with pytest.raises(ConfigError, match=r"mIoU in 8 images .* is reached by one class"):
        tried(lambda entry, size: torch.zeros(size, dtype=torch.int64))


def test_a_teacher_of_more_classes_is_refused(tried):
    with pytest.raises(ConfigError, match=r"gives a pixel the class 11, but the student has 11"):
        tried(lambda entry, size: torch.full(size, 11))


def test_a_teacher_that_knows_is_told_of(tried, caplog):
    with caplog.at_level("INFO", logger="detectron2.pcka"):
        tried(_truth)
    assert "The teacher's mIoU in 8 training images is 100.00 %" in caplog.text


def test_mean_iou_is_that_of_the_classes_that_are_there():
    counts = torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    assert mean_iou(counts) == pytest.approx(100 * (3 / 6 + 2 / 5) / 2)
    assert mean_iou(torch.zeros(2, 2)) == 0


def test_a_teacher_classifies_inside_as_it_does_by_itself(small_config, batch):
    cfg = small_config(f"{FOLDER}/pcka")
    torch.manual_seed(0)
    inside = build_teacher(cfg, with_head=True).model
    torch.manual_seed(0)
    alone = build_student(teacher_config(cfg)).eval()
    image = batch[0]["image"]
    with torch.no_grad():
        expected = alone([{"image": image, "height": 64, "width": 48}])[0]["sem_seg"].argmax(0)
        assert torch.equal(inside.eval().classify(image, 64, 48), expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("MODEL.SEM_SEG_HEAD.NAME", "Nothing"),
            r"SEM_SEG_HEAD\.NAME: unknown 'Nothing'",
        ),
        ((*DILATED, "SOLVER.IMS_PER_BATCH", "1"), r"PSPHead normalises .* 1 image\(s\).*SyncBN"),
    ],
)
def test_a_segmenter_that_cannot_train_is_refused_before_it_starts(small_config, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_run(small_config(f"{FOLDER}/student", *keys))


def test_one_image_is_enough_for_heads_of_other_norms(small_config):
    one = ("SOLVER.IMS_PER_BATCH", "1")
    check_run(small_config(f"{FOLDER}/student", *one))
    check_run(
        small_config(f"{FOLDER}/student", *DILATED, *one, "MODEL.SEM_SEG_HEAD.NORM", "SyncBN")
    )


@pytest.mark.parametrize(
    ("teacher", "student", "tried"),
    [
        ("digits_pixels", f"{FOLDER}/pcka", ["check_pixels"]),
        ("digits", "pcka", ["check_detections"]),
        ("digits_pixels", "pcka", []),  # gives no boxes, and is told no classes of pixels
    ],
)
def test_a_teacher_is_tried_at_what_its_student_learns(
    small_config, monkeypatch, teacher, student, tried
):
    keys = ("DISTILL.TEACHER.CONFIG_FILE", f"configs/detection/{teacher}/teacher.yaml")
    cfg = small_config(student, *keys)
    register_datasets(cfg)
    asked = []
    for name in ("check_features", "check_pixels", "check_detections"):
        monkeypatch.setattr(teacher_checks, name, lambda *_, name=name: asked.append(name))
    inside = build_teacher(cfg, with_head=True)
    cfg.DISTILL.TEACHER.RANDOM_WEIGHTS = False
    teacher_checks.check_teacher(inside, cfg, training_set(cfg))
    assert asked == ["check_features", *tried]
