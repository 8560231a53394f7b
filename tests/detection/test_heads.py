"""Teachers with heads, and the methods that compare what heads give."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from detection import train_net
from detection.config import PROJECT
from detection.dense import DenseParts
from detection.figures import read_metrics
from detection.teacher import TeacherBackbone, TeacherDetector
from pcka.engine.config import ConfigError

WIDE = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.FPN.OUT_CHANNELS", 64)
METHODS = ("CROSSKD", "DENSEKD", "FGD", "ROIKD", "LD")
RCNN = (
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES", [[20], [40], [80], [160]],
    "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES", 10,
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
)  # fmt: skip


def methods(*names):
    """Overrides that choose methods; both heads have one convolution before the crossing."""
    depth = ("DISTILL.CROSSKD.DEPTH", "1") if "CROSSKD" in names else ()
    return ("DISTILL.METHODS", str(list(names)), *depth)


def teacher_of(*options):
    return ("DISTILL.TEACHER.OPTS", str(list(options)))


@pytest.fixture
def fitting(pair):
    """``fitting(method)``: overrides that make both such detectors as the method compares."""
    return lambda method: pair("GFL") if method == "LD" else regions(method)


def regions(method):
    """Overrides that make both a Faster R-CNN, where the method needs regions."""
    if method != "ROIKD":
        return teacher_of(*WIDE)
    rcnn = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *RCNN)
    return ("DISTILL.STUDENT", "GeneralizedRCNN", *map(str, RCNN), *teacher_of(*WIDE, *rcnn))


@pytest.fixture
def pair(own_detector):
    """``pair(architecture)``: overrides that make student and teacher of that architecture."""

    def make(architecture):
        if architecture == "RetinaNet":
            return ()
        own = own_detector(architecture)
        words = [int(word) if word.isdigit() else word for word in own[2:]]
        return (*own, *teacher_of("MODEL.META_ARCHITECTURE", architecture, *words))

    return make


def _maps(detector, side=128):
    torch.manual_seed(0)
    with torch.no_grad():
        return detector.backbone(torch.randn(2, 3, side, side))


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS", "GFL"])
@pytest.mark.parametrize("norm", ["GN", "BN"])  # a batch norm of the head is one for each level
def test_inner_maps_through_the_rest_of_their_own_head_are_its_predictions(
    build, pair, architecture, norm
):
    own = [f"MODEL.{architecture.upper()}.NORM", norm]
    model = build(*pair(architecture), *methods("PCKA"), *own).eval()
    detector = model.student
    for module in detector.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    if architecture == "GFL":
        detector.head.scales.data.uniform_(0.5, 2)
    depth = 1 if architecture == "RetinaNet" else 3
    parts, maps = DenseParts(detector, depth), _maps(detector)
    with torch.no_grad():
        head = parts.run(maps)
        crossed = parts.rest(head.inner)
        logits, shifts, *_ = detector.head([maps[level] for level in detector.head_in_features])
    assert torch.equal(crossed.logits, head.predictions.logits)
    assert torch.equal(crossed.boxes, head.predictions.boxes)
    assert head.predictions.logits.shape[1] == head.predictions.boxes.shape[1]
    expected = parts.decoded(logits, shifts)
    assert torch.equal(expected.boxes, head.predictions.boxes)
    before = parts.detector.head.cls_subnet[parts.split["cls"]]
    assert isinstance(before, nn.ReLU)  # which comes behind the inner maps
    assert min(x.min() for x in head.inner["cls"]) < 0


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS", "GFL", "RepPoints"])
def test_positions_are_those_of_the_detectors_own_inference(build, pair, architecture):
    """The best position of an image is its best detection."""
    detector = build(*pair(architecture), *methods("PCKA")).student.eval()
    detector.test_score_thresh = 0.0
    maps = _maps(detector)
    with torch.no_grad():
        head = DenseParts(detector).run(maps).predictions
        raw = detector.head([maps[level] for level in detector.head_in_features])
    if architecture == "FCOS":  # whose scores are those of the class and of the centre
        raw = (*raw[:2], [torch.full_like(x, 30.0) for x in raw[2]])
    images = type("Images", (), {"image_sizes": [(128, 128)] * 2})
    features = [maps[level] for level in detector.head_in_features]
    found = detector.forward_inference(images, features, [[x.clone() for x in y] for y in raw])
    for image, (logits, boxes) in zip(found, zip(head.logits, head.boxes)):
        position, label = divmod(int(logits.flatten().argmax()), logits.shape[1])
        assert label == image.pred_classes[0]
        torch.testing.assert_close(boxes[position], image.pred_boxes.tensor[0])


def test_distributions_of_a_gfl_have_the_boxes_as_their_means(build, small_gfl):
    detector = build(*small_gfl, *methods("PCKA")).student.eval()
    with torch.no_grad():
        head = DenseParts(detector).run(_maps(detector)).predictions
    assert head.distributions.shape == (*head.boxes.shape, 17)
    means = (head.distributions.softmax(-1) * torch.arange(17)).sum(-1)
    strides = torch.tensor([8.0] * 256 + [16] * 64 + [32] * 16 + [64] * 4 + [128])[:, None]
    sides = (means[..., :2] + means[..., 2:]) * strides
    torch.testing.assert_close(head.boxes[..., 2:] - head.boxes[..., :2], sides)


def test_the_backbone_alone_is_the_default(build):
    assert type(build().teacher.model) is TeacherBackbone
    assert type(build(*methods("FGD", "MGD")).teacher.model) is TeacherBackbone


def test_a_head_that_no_method_reads_is_built_and_does_not_run(build, batch, storage):
    model = build("DISTILL.TEACHER.HEAD", "True").train()
    assert type(model.teacher.model) is TeacherDetector
    model.teacher.model.detector.head.register_forward_hook(lambda *_: pytest.fail("it runs"))
    expected, found = build().train()(batch), model(batch)
    assert {n: t.item() for n, t in found.items()} == {n: t.item() for n, t in expected.items()}


def test_a_teacher_with_a_head_is_in_neither_state_nor_parameters(build):
    model = build(*methods("CROSSKD"))
    heads = model.teacher.model.detector.head
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in heads.parameters()}
    assert not any(p.requires_grad for p in heads.parameters())
    assert all(n.startswith("distiller.student.") for n in model.state_dict())
    assert model.double().teacher.model.detector.head.cls_score.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((kind, method) for kind in ("RetinaNet", "FCOS") for method in METHODS[:3]),
        ("GFL", "CROSSKD"),
        ("GFL", "DENSEKD"),
        ("GFL", "LD"),
        ("RepPoints", "DENSEKD"),
    ],
)
def test_gradient_reaches_the_student_and_the_adapters_alone(
    build, batch, storage, pair, architecture, method
):
    wide = teacher_of(*WIDE) if architecture == "RetinaNet" else ()
    model = build(*pair(architecture), *wide, *methods(method)).train()
    terms = {name: t for name, t in model(batch).items() if method.lower() in name}
    assert terms
    assert all(t.isfinite() and t > 0 for t in terms.values())
    sum(terms.values()).backward()
    student = model.student
    assert student.backbone.fpn_lateral3.weight.grad.norm() > 0
    head = student.head
    inner, last = head.bbox_subnet[0].weight.grad, head.bbox_pred.weight.grad
    assert (inner is not None) == (method != "FGD")
    assert (last is not None) == (method in ("DENSEKD", "LD"))  # CrossKD leaves it to the labels
    assert (head.cls_score.weight.grad is not None) == (method == "DENSEKD")
    parts = [*model.distiller.adapters.parameters(), *model.distiller.losses.parameters()]
    assert bool(parts) == (method == "FGD" or (method == "CROSSKD" and bool(wide)))
    assert all(p.grad is not None for p in parts)
    assert all(p.grad is None for p in model.teacher.parameters())


def test_regions_send_a_gradient_to_the_student_alone(build, batch, storage):
    model = build(*regions("ROIKD"), *methods("ROIKD")).train()
    _stir(model.teacher.model)
    terms = {name: t for name, t in model(batch).items() if "roikd" in name}
    assert all(t.isfinite() and t > 0 for t in terms.values())
    sum(terms.values()).backward()
    heads = model.student.roi_heads
    layers = heads.box_head.fc1, heads.box_predictor.cls_score, heads.box_predictor.bbox_pred
    assert all(layer.weight.grad.norm() > 0 for layer in layers)
    assert model.student.backbone.fpn_lateral3.weight.grad.norm() > 0
    assert model.student.proposal_generator.rpn_head.conv.weight.grad is None
    assert all(p.grad is None for p in model.teacher.parameters())


def test_both_box_heads_judge_the_teachers_proposals(build, batch, storage):
    model = build(*regions("ROIKD"), *methods("ROIKD"), "DISTILL.ROIKD.PROPOSALS", "7").train()
    seen = []
    loss = model.distiller.losses[0]
    terms = loss.terms
    loss.terms = lambda s, t, target: seen.append((s.head, t.head)) or terms(s, t, target)
    model(batch)
    ((own, other),) = seen
    assert own.proposals is other.proposals
    assert [len(boxes) for boxes in other.proposals] == [7, 7]
    assert own.logits.shape == other.logits.shape == (14, 11)
    assert own.deltas.shape == other.deltas.shape == (14, 10, 4)
    teacher = model.teacher.model
    images = [entry["image"] for entry in batch]
    maps = teacher(images, (128, 128))
    heads = teacher.detector.roi_heads
    pooled = heads.box_pooler([maps[level] for level in heads.box_in_features], other.proposals)
    with torch.no_grad():
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
    assert torch.equal(logits, other.logits)
    assert torch.equal(deltas, other.deltas.flatten(1))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_falls_on_one_batch(build, batch, storage, fitting, method):
    model = build(*fitting(method), *methods(method)).train()
    _stir(model.teacher.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history = []
    for _ in range(12):
        terms = model(batch)
        loss = sum(term for name, term in terms.items() if method.lower() in name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def _stir(teacher):
    """Let the untrained teacher's scores differ, as those of a trained one do."""
    for name, layer in teacher.named_modules():
        if name.endswith(("cls_score", "head.bbox_pred")):
            torch.manual_seed(0)
            nn.init.normal_(layer.weight, std=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_survives_autocast_to_bfloat16(build, batch, storage, fitting, method):
    model = build(*fitting(method), *methods(method)).train()
    _stir(model.teacher.model)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)
    sum(mixed.values()).backward()
    for name, term in exact.items():
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], term, rtol=0.1, atol=0.02)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)


def test_methods_of_heads_and_of_maps_add_up(build, batch, storage):
    terms = build(*methods("PCKA", "CROSSKD", "DENSEKD", "FGD", "MGD")).train()(batch)
    kinds = {name.split("_")[1] for name in terms}
    assert kinds == {"cls", "box", "pcka", "crosskd", "densekd", "fgd", "mgd"}


def test_pcka_of_the_objects_falls_on_one_batch(build, batch, storage):
    model = build(*methods("PCKA"), "DISTILL.PCKA.BACKGROUND", "0.5").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        loss = sum(term for name, term in model(batch).items() if "pcka" in name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_boxes_reach_the_losses_as_parts_of_the_canvas(build, batch, storage):
    model = build(*methods("FGD")).train()
    seen = []
    fgd = model.distiller.losses[0]
    terms = fgd.terms
    fgd.terms = lambda s, t, target: seen.append(target) or terms(s, t, target)
    model(batch)
    # One object in the first of two images, which are padded to 128 x 128.
    expected = torch.tensor([[0, 8 / 128, 8 / 128, 40 / 128, 50 / 128]])
    torch.testing.assert_close(seen[0], expected)


def test_a_batch_without_objects_to_learn_from_is_refused(build, batch, storage, monkeypatch):
    """As that of a student of classes of pixels."""
    model = build(*methods("FGD")).train()
    monkeypatch.setattr(
        model.student, "forward", lambda x: model.student.backbone(_canvas(x)) and {}
    )
    bare = [{"image": x["image"], "file_name": "a.png"} for x in batch]
    with pytest.raises(ConfigError, match=r"needs the boxes of the objects, but 'a\.png' has none"):
        model(bare)


def _canvas(batched_inputs):
    return torch.zeros(len(batched_inputs), 3, 128, 128)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("DISTILL.METHODS", "['CROSSKD']"),
            r"CrossKD: the student: .*1 convolution.*largest is 1",
        ),
        (methods("LD"), r"DISTILL: LD compares distributions .* use DENSEKD or CROSSKD"),
        (
            (*methods("DENSEKD"), *teacher_of("MODEL.RETINANET.NUM_CLASSES", 7)),
            "DISTILL: student and teacher must be predictions of one shape .*anchors and classes",
        ),
        (
            (*methods("CROSSKD"), "DISTILL.STUDENT", "GeneralizedRCNN", *map(str, RCNN)),
            "CrossKD: the student: GeneralizedRCNN has no dense head; use a RetinaNet, FCOS,",
        ),
        (
            (*methods("DENSEKD"), *teacher_of("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *RCNN)),
            "DenseKD: the teacher: GeneralizedRCNN has no dense head",
        ),
        (
            methods("ROIKD"),
            "RoIKD: the student: RetinaNet has no single box head .*StandardROIHeads",
        ),
        (
            (*regions("ROIKD"), *methods("ROIKD"), *teacher_of(*WIDE)),
            "RoIKD: the teacher: RetinaNet has no single box head",
        ),
        (
            (*regions("ROIKD"), *methods("ROIKD"), "MODEL.ROI_HEADS.NUM_CLASSES", "7"),
            "DISTILL: student and teacher must be logits of one shape",
        ),
        (
            (
                *regions("ROIKD"),
                *methods("ROIKD"),
                "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
                "[1,1,1,1]",
            ),
            r"BBOX_REG_WEIGHTS: \(1.*\) of the student and \(10.*use the teacher's",
        ),
        (methods("ROIKD", "DENSEKD"), "RoIKD, DenseKD read heads of two kinds"),
        (
            (*methods("DENSEKD"), *teacher_of("MODEL.META_ARCHITECTURE", "Nope")),
            "MODEL.META_ARCHITECTURE: unknown 'Nope'",
        ),
    ],
)
def test_heads_that_cannot_be_read_or_compared_are_refused(build, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


def test_layers_that_see_both_branches_are_not_crossed(build, pair):
    with pytest.raises(ConfigError, match="the last layers of a RepPoints head see both branches"):
        build(*pair("RepPoints"), *methods("CROSSKD"))


def _weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method"), [("", "ROIKD"), ("GFL", "LD"), ("RepPoints", "DENSEKD")]
)
def test_a_run_on_heads_goes_on_bit_for_bit(tmp_path, arguments, pair, architecture, method):
    own = pair(architecture) if architecture else regions(method)
    # Without a warm-up, whose length follows from that of the run.
    keys = (*own, *methods(method), "SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()")
    train_net.main(arguments(tmp_path / "whole", 4, *keys))
    train_net.main(arguments(tmp_path / "cut", 2, *keys))
    train_net.main(arguments(tmp_path / "cut", 4, *keys, flags=["--resume"]))
    whole, cut = (_weights(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method", "terms"),
    [
        ("", "ROIKD", {"loss_roikd_cls", "loss_roikd_box"}),
        ("GFL", "LD", {"loss_ld", "loss_gfl_dfl"}),
        ("RepPoints", "DENSEKD", {"loss_densekd_box", "loss_reppoints_first"}),
    ],
)
def test_two_processes_train_on_heads(tmp_path, arguments, pair, architecture, method, terms):
    own = pair(architecture) if architecture else regions(method)
    keys = (*own, *methods(method), "INPUT.MIN_SIZE_TRAIN", "[64, 128]")
    script = str(PROJECT / "detection" / "train_net.py")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29534"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, script, *arguments(tmp_path, 3, *keys)],
        capture_output=True, text=True, cwd=PROJECT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert terms <= read_metrics(tmp_path / "metrics.json").keys()
