"""What holds for every registered loss."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from pcka import losses
from pcka.losses import Context, Outputs
from pcka.losses.heads import Dense, DenseHead, PixelHead, RegionHead

SAMPLES, CLASSES, TRAINING_SET = 8, 5, 40
STAGES = ("stage1", "stage2", "stage3")
MAPS = ("stage0", *STAGES, "last", *(f"{stage}_preact" for stage in STAGES), "last_preact")
SHAPES = dict.fromkeys(MAPS, (SAMPLES, 4, 16, 16)) | {"pooled": (SAMPLES, 6)}
TRAIN_LABELS = torch.arange(TRAINING_SET) % CLASSES
TARGET = TRAIN_LABELS[:SAMPLES]
NAMES = losses.names()
PREPARED = {
    "CC", "CRD", "FGD", "FITNET", "ICKD", "ITRD", "MGD", "OFD", "REVIEWKD", "SRRL", "VID", "VKD",
}  # fmt: skip
# One object in each of three images, two in the first, none in the others.
BOXES = torch.tensor(
    [[0, 0.1, 0.1, 0.5, 0.6], [0, 0.4, 0.4, 0.9, 0.9], [1, 0, 0, 1, 1], [5, 0.2, 0.7, 0.3, 0.8]]
)
POSITIONS, BINS = 6, 3
TEACHER_ONLY = {"SRRL": {"pooled"}}  # taps that a loss reads of the teacher alone


@pytest.fixture(autouse=True)
def seed():
    """Adapters start from random weights, and some losses draw samples or masks."""
    torch.manual_seed(0)


def _outputs(draw, name, seed, dtype=torch.float64, scale=1.0):
    features = {
        tap: draw(seed + i, *shape, scale=scale).to(dtype)
        for i, (tap, shape) in enumerate(SHAPES.items())
    }
    logits = draw(seed + 19, SAMPLES, CLASSES, scale=scale).to(dtype)
    make = {RegionHead: _region_head, PixelHead: _pixel_head}.get(losses.find(name).needs_head)
    head = (make or _dense_head)(draw, seed + 20, dtype, scale)
    return Outputs(logits, features, indices=torch.arange(SAMPLES), head=head)


def _region_head(draw, seed, dtype, scale):
    logits = draw(seed, 2 * SAMPLES, CLASSES + 1, scale=scale)
    deltas = draw(seed + 1, 2 * SAMPLES, CLASSES, 4, scale=scale)
    return RegionHead(logits.to(dtype), deltas.to(dtype))


def _pixel_head(draw, seed, dtype, scale):
    logits = draw(seed, SAMPLES, CLASSES, 4, 3, scale=scale)
    features = draw(seed + 1, SAMPLES, 6, 4, 3, scale=scale)
    labels = torch.arange(SAMPLES * 8 * 6).view(SAMPLES, 8, 6) % (CLASSES + 1) - 1
    return PixelHead(logits.to(dtype), features.to(dtype), labels)


def _dense_head(draw, seed, dtype, scale):
    """Two levels, (2, 2) and (1, 2), of one anchor; the layers behind the inner maps are linear."""
    classes, shifts = draw(seed + 3, 4, CLASSES), draw(seed + 4, 4, 4)

    def flat(maps, weight):
        rows = torch.cat([x.flatten(2).mT for x in maps], 1)
        return rows @ weight.to(rows.dtype)

    def rest(inner):
        return predicted(flat(inner["cls"], classes), flat(inner["box"], shifts))

    def predicted(logits, corners):
        size = corners.abs() + 0.5
        boxes = torch.cat([corners[..., :2], corners[..., :2] + size[..., 2:]], -1)
        return Dense(logits, boxes)

    inner = {
        branch: [
            draw(seed + 6 + 2 * i + j, SAMPLES, 4, *size, scale=scale).to(dtype)
            for j, size in enumerate(((2, 2), (1, 2)))
        ]
        for i, branch in enumerate(("cls", "box"))
    }
    own = predicted(
        draw(seed, SAMPLES, POSITIONS, CLASSES, scale=scale).to(dtype),
        draw(seed + 1, SAMPLES, POSITIONS, 4).to(dtype),
    )
    spread = draw(seed + 2, SAMPLES, POSITIONS, 4, BINS, scale=scale).to(dtype)
    return DenseHead(Dense(own.logits, own.boxes, spread), inner, rest)


def _target(name):
    return BOXES if losses.find(name).needs_boxes else TARGET


def _pair(draw, name, *args):
    return _outputs(draw, name, 0, *args), _outputs(draw, name, 40, *args)


def _unprepared(name):
    """The loss with its defaults; a patch that leaves several on these maps."""
    patched = "patch_sizes" in losses.defaults(name)
    return losses.build(name, **({"patch_sizes": (4,)} if patched else {}))


def _build(name, student, teacher):
    loss = _unprepared(name)
    dtype = student.logits.dtype
    classifier = nn.Linear(6, CLASSES, dtype=dtype)
    nn.init.normal_(classifier.weight, generator=torch.Generator().manual_seed(1))
    nn.init.zeros_(classifier.bias)
    norm = torch.linspace(0.5, 1.5, 4, dtype=dtype), torch.linspace(-0.5, 0.5, 4, dtype=dtype)
    context = Context(
        train_labels=TRAIN_LABELS,
        teacher_classifier=classifier,
        teacher_norms={tap: norm for tap in MAPS if tap.endswith("_preact")},
    )
    with torch.no_grad():
        loss.prepare(student, teacher, context)
    return loss


def _leaves(outputs):
    return [outputs.logits, *outputs.features.values(), *_of_head(outputs)]


def _of_head(outputs):
    if isinstance(outputs.head, RegionHead):
        return [outputs.head.logits, outputs.head.deltas]
    if isinstance(outputs.head, PixelHead):
        return [outputs.head.logits, outputs.head.features]
    own, inner = outputs.head.predictions, outputs.head.inner
    return [own.logits, own.boxes, own.distributions, *inner["cls"], *inner["box"]]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_what_the_loss_reads_of_the_student_alone(draw, name):
    student, teacher = _pair(draw, name)
    loss = _build(name, student, teacher)
    for leaf in _leaves(student):
        leaf.requires_grad_()
    for leaf in _leaves(teacher):
        leaf.requires_grad_()
    sum(loss(student, teacher, _target(name)).values()).backward()
    for tap in set(loss.taps) - TEACHER_ONLY.get(name, set()):
        assert student.features[tap].grad.norm() > 0
    if loss.needs_head:
        assert any(x.grad is not None and x.grad.norm() > 0 for x in _of_head(student))
    elif not loss.taps:
        assert student.logits.grad.norm() > 0
    assert all(leaf.grad is None for leaf in _leaves(teacher))
    norms = [parameter.grad.norm() for parameter in loss.parameters()]
    assert all(norm.isfinite() for norm in norms)
    assert not norms or max(norms) > 0


@pytest.mark.parametrize("name", [n for n in NAMES if not losses.build(n).of_detectors])
def test_soft_targets_are_taken_or_refused_with_a_reason(draw, name):
    """Those of one class each say what the classes say; mixed ones have a gradient."""
    student, teacher = _pair(draw, name)
    loss = _build(name, student, teacher)
    assert bool(loss.refuses_soft_targets) == (name == "CRD")
    soft = nn.functional.one_hot(TARGET, CLASSES).to(student.logits.dtype)
    of_classes, of_shares = (
        _seeded(copy.deepcopy(loss), student, teacher, target) for target in (TARGET, soft)
    )
    for term, value in of_classes.items():
        torch.testing.assert_close(of_shares[term], value)
    for leaf in _leaves(student):
        leaf.requires_grad_()
    sum(loss(student, teacher, soft.lerp(soft.flip(0), 0.3)).values()).backward()
    gradients = [leaf.grad for leaf in _leaves(student) if leaf.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_batch(draw, name):
    student, teacher = _pair(draw, name)
    loss = _build(name, student, teacher)
    leaves = [leaf.requires_grad_() for leaf in _leaves(student)]
    groups = [{"params": leaves, "lr": 0.02}]
    if adapters := list(loss.parameters()):
        groups.append({"params": adapters, "lr": 0.05})
    optimizer = torch.optim.Adam(groups)
    history = []
    for _ in range(40):
        terms = loss(student, teacher, _target(name)).values()
        assert min(terms) > -1e-6 or loss.can_be_negative
        total = sum(terms)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    # Cross-entropies do not end at 0; each falls by a tenth of its start at the very least.
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_outputs_stay_finite_and_exact(draw, name, dtype):
    student, teacher = _pair(draw, name, dtype, 30)
    loss = _build(name, student, teacher)
    in_double = copy.deepcopy(loss).double()
    terms = _seeded(loss, student, teacher)
    exact = _seeded(in_double, *(_cast(outputs, torch.float64) for outputs in (student, teacher)))
    for term, value in terms.items():
        assert value.dtype == torch.float32
        atol = 1e-3 * exact[term].abs().item()
        torch.testing.assert_close(value.double(), exact[term], rtol=2e-3, atol=atol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_losses_in_float32(draw, name, dtype):
    """Adapters and layers of heads may round to bfloat16 as the models do, losses may not."""
    student, teacher = _pair(draw, name, dtype)
    loss = _build(name, student, teacher)
    for leaf in _leaves(student):
        leaf.requires_grad_()
    outside = _seeded(copy.deepcopy(loss), student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        terms = _seeded(loss, student, teacher)
    sum(terms.values()).backward()
    rounding = list(loss.parameters()) or loss.head_depth
    rtol, atol = (0.05, 1e-3) if rounding else (1e-4, 1e-5)
    for term, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, outside[term], rtol=rtol, atol=atol)
    for leaf in (*_leaves(student), *loss.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_state_is_saved_and_resumed(draw, name):
    student, teacher = _pair(draw, name)
    loss = _build(name, student, teacher)
    loss(student, teacher, _target(name))  # changes what has a memory
    torch.manual_seed(1)
    resumed = _build(name, student, teacher)
    resumed.load_state_dict(loss.state_dict())
    expected = _seeded(loss, student, teacher)
    for term, value in _seeded(resumed, student, teacher).items():
        torch.testing.assert_close(value, expected[term], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_was_not_prepared_says_so_or_needs_no_preparation(draw, name):
    student, teacher = _pair(draw, name)
    loss = _unprepared(name)
    if name in PREPARED:
        with pytest.raises((RuntimeError, ValueError), match=r"Distiller\.prepare"):
            loss(student, teacher, _target(name))
    else:
        expected = _seeded(_build(name, student, teacher), student, teacher)
        torch.testing.assert_close(_seeded(loss, student, teacher), expected, rtol=0, atol=0)


def _with(keyword):
    return [name for name in NAMES if keyword in losses.defaults(name)]


@pytest.mark.parametrize("name", _with("stages"))
def test_stages_are_a_list_of_one_or_more(name):
    with pytest.raises(ValueError, match=r"stages must be a list of names, got 'last'"):
        losses.build(name, stages="last")
    with pytest.raises(ValueError, match="stages is empty"):
        losses.build(name, stages=[])


@pytest.mark.parametrize("name", sorted({*_with("weights"), *_with("feature_weights")}))
def test_one_weight_serves_all_stages(draw, name):
    defaults = losses.defaults(name)
    keyword = "weights" if "weights" in defaults else "feature_weights"
    patches = {"patch_sizes": 4} if "patch_sizes" in defaults else {}
    stages = ["stage1", "stage2"]
    student, teacher = _pair(draw, name)
    terms = []
    for weights in (0.5, [0.5, 0.5]):
        torch.manual_seed(0)
        loss = losses.build(name, stages=stages, **{keyword: weights}, **patches)
        loss.prepare(student, teacher)
        terms.append(_seeded(loss, student, teacher))
    torch.testing.assert_close(*terms, rtol=0, atol=0)
    assert all(value > 0 for value in terms[0].values())


@pytest.mark.parametrize(
    ("name", "keyword"),
    [(name, key) for name in NAMES for key in losses.defaults(name) if key.endswith("weight")],
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_a_weight_that_trains_away_is_refused(name, keyword, value):
    with pytest.raises(ValueError, match=f"{keyword} must be finite and at least 0"):
        losses.build(name, **{keyword: value})


def _seeded(loss, student, teacher, target=TARGET):
    """The terms, with the samples and masks that any other such call draws."""
    torch.manual_seed(2)
    return loss(student, teacher, BOXES if loss.needs_boxes else target)


def _cast(outputs, dtype):
    features = {name: feature.to(dtype) for name, feature in outputs.features.items()}
    head = _cast_head(outputs.head, dtype)
    return Outputs(outputs.logits.to(dtype), features, outputs.indices, head=head)


def _cast_head(head, dtype):
    if isinstance(head, RegionHead):
        return RegionHead(head.logits.to(dtype), head.deltas.to(dtype))
    if isinstance(head, PixelHead):
        return PixelHead(head.logits.to(dtype), head.features.to(dtype), head.labels)
    own = head.predictions
    predictions = Dense(*(x.to(dtype) for x in (own.logits, own.boxes, own.distributions)))
    inner = {branch: [x.to(dtype) for x in maps] for branch, maps in head.inner.items()}
    return replace(head, predictions=predictions, inner=inner)
