"""Weights of mmdet: a small model with its names, and the names and shapes of its large ones."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("detectron2")

from detection.checkpoint import WeightsError
from detection.config import PROJECT, load_config
from detection.teacher import build_teacher
from tools import convert_mmdet

TEACHERS = PROJECT / "configs" / "detection" / "coco" / "teachers"
CAFFE = {"mean": [102.9801, 115.9465, 122.7717], "std": [1.0, 1.0, 1.0], "rgb": False}
TORCH = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "rgb": True}


class Bottleneck(nn.Module):
    """mmdet's: the style says which convolution has the stride."""

    def __init__(self, inputs, width, outputs, stride, groups, style):
        super().__init__()
        strides = (stride, 1) if style == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, groups, style, stem=16, width=8, outputs=32, depths=(3, 4, 6, 3)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        inputs = stem
        for stage, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                shape = width << stage, outputs << stage
                blocks.append(Bottleneck(inputs, *shape, stride, groups, style))
                inputs = outputs << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class ConvModule(nn.Module):
    def __init__(self, inputs, outputs, *shape, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, *shape, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, x):
        return self.conv(x) if self.bn is None else self.bn(self.conv(x))


class FPN(nn.Module):
    """mmdet's neck of five outputs; ``extra`` is its ``add_extra_convs``."""

    def __init__(self, widths, channels, start, extra, relu, norm):
        super().__init__()
        self.start, self.extra, self.relu = start, extra, relu
        used = widths[start:]
        self.lateral_convs = nn.ModuleList(ConvModule(w, channels, 1, norm=norm) for w in used)
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, 1, 1, norm=norm) for _ in used
        )
        if extra:
            first = widths[-1] if extra == "on_input" else channels
            for inputs in (first, channels):
                self.fpn_convs.append(ConvModule(inputs, channels, 3, 2, 1))

    def forward(self, maps):
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps[self.start :], strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, merged)]
        if not self.extra:
            return [*outs, F.max_pool2d(outs[-1], 1, 2)]
        outs.append(self.fpn_convs[-2](maps[-1] if self.extra == "on_input" else outs[-1]))
        outs.append(self.fpn_convs[-1](F.relu(outs[-1]) if self.relu else outs[-1]))
        return outs


class Detector(nn.Module):
    def __init__(
        self, groups=1, style="pytorch", start=1, extra="on_input", relu=False, norm=False
    ):
        super().__init__()
        self.backbone = ResNet(groups, style)
        self.neck = FPN((32, 64, 128, 256), 24, start, extra, relu, norm)
        self.bbox_head = nn.Conv2d(24, 7, 3)

    def forward(self, images):
        return self.neck(self.backbone(images))


def _detector(**settings):
    """A model in evaluation mode whose every number is drawn, batch norm's statistics too."""
    torch.manual_seed(0)
    model = Detector(**settings).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.8)
            for offset in (module.running_mean, module.bias):
                nn.init.normal_(offset, std=0.2)
    return model


def _overrides(groups=1, style="pytorch", start=1, extra="on_input", relu=False, norm=False):
    """The same model in detectron2's words."""
    pixels = CAFFE if style == "caffe" else TORCH
    levels = [f"res{level}" for level in range(start + 2, 6)]
    source = {"on_input": "res5", "on_output": "p5"}.get(extra, "res5")
    name = "build_p6p7_resnet_fpn_backbone" if extra else "build_resnet_fpn_backbone"
    return [
        "MODEL.BACKBONE.NAME", name,
        "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16",
        "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.OUT_FEATURES", str(levels),
        "MODEL.RESNETS.NUM_GROUPS", str(groups), "MODEL.RESNETS.WIDTH_PER_GROUP", str(8 // groups),
        "MODEL.RESNETS.STRIDE_IN_1X1", str(style == "caffe"),
        "MODEL.FPN.IN_FEATURES", str(levels), "MODEL.FPN.OUT_CHANNELS", "24",
        "MODEL.FPN.NORM", "BN" if norm else "",
        "MODEL.FPN.P6P7.IN_FEATURE", source, "MODEL.FPN.P6P7.RELU", str(relu),
        "MODEL.PIXEL_MEAN", str(pixels["mean"]), "MODEL.PIXEL_STD", str(pixels["std"]),
        "INPUT.FORMAT", "RGB" if pixels["rgb"] else "BGR",
    ]  # fmt: skip


MODELS = {
    "RetinaNet": {},
    "RetinaNet with ReLU": {"relu": True},
    "FCOS": {"style": "caffe", "extra": "on_output", "relu": True},
    "GFL": {"extra": "on_output"},
    "Faster R-CNN": {"start": 0, "extra": None},
    "Cascade R-CNN X": {"groups": 4, "start": 0, "extra": None},
    "RetinaNet X": {"groups": 4},
    "Faster R-CNN caffe": {"style": "caffe", "start": 0, "extra": None},
    "Faster R-CNN with norms": {"start": 0, "extra": None, "norm": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_teacher_gives_mmdets_maps(tmp_path, name):
    settings = MODELS[name]
    theirs = _detector(**settings)
    path = tmp_path / "mmdet.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": theirs.state_dict()}, path)
    overrides = _overrides(**settings)
    base = str(PROJECT / "configs/detection/coco/schedule_2x.yaml")
    output = tmp_path / "converted.pth"
    arguments = ["--config-file", base, "--weights", str(path), "--output", str(output)]
    convert_mmdet.main([*arguments, *overrides])
    cfg = load_config(base, ["MODEL.DEVICE", "cpu"])  # the student's images are BGR
    cfg.DISTILL.TEACHER.update(CONFIG_FILE=base, OPTS=overrides, WEIGHTS=str(output))
    teacher = build_teacher(cfg)

    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    pixels = CAFFE if settings.get("style") == "caffe" else TORCH
    as_loaded = image.numpy()[::-1].copy() if pixels["rgb"] else image.numpy()
    shift, scale = (np.array(pixels[key])[:, None, None] for key in ("mean", "std"))
    batch = torch.from_numpy((as_loaded - shift) / scale).float()[None]
    with torch.no_grad():
        expected = theirs(batch)
    maps = teacher([image], (64, 96))
    first = 2 + settings.get("start", 1)
    assert list(maps) == [f"p{first + i}" for i in range(len(expected))]
    for ours, wanted in zip(maps.values(), expected, strict=True):
        assert wanted.std() > 0
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def _named(prefix, **shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _norm(prefix, channels):
    entries = ("weight", "bias", "running_mean", "running_var")
    return _named(prefix, **dict.fromkeys(entries, (channels,)), num_batches_tracked=())


def _conv(prefix, outputs, inputs, size, *, bias):
    shape = {"weight": (outputs, inputs, size, size)}
    return _named(prefix, **shape, **({"bias": (outputs,)} if bias else {}))


def _resnet101(groups, base_width):
    """Names and shapes of mmdet's ResNet-101 or ResNeXt-101."""
    found = _conv("backbone.conv1", 64, 3, 7, bias=False) | _norm("backbone.bn1", 64)
    inputs = 64
    for stage, depth in enumerate((3, 4, 23, 3)):
        planes = 64 * 2**stage
        width = planes if groups == 1 else planes * base_width // 64 * groups
        for block in range(depth):
            here = f"backbone.layer{stage + 1}.{block}"
            found |= _conv(f"{here}.conv1", width, inputs, 1, bias=False)
            found |= _conv(f"{here}.conv2", width, width // groups, 3, bias=False)
            found |= _conv(f"{here}.conv3", 4 * planes, width, 1, bias=False)
            for i, channels in enumerate((width, width, 4 * planes), start=1):
                found |= _norm(f"{here}.bn{i}", channels)
            if block == 0:
                found |= _conv(f"{here}.downsample.0", 4 * planes, inputs, 1, bias=False)
                found |= _norm(f"{here}.downsample.1", 4 * planes)
            inputs = 4 * planes
    return found


def _fpn(start, extra):
    found = {}
    for i, inputs in enumerate((256, 512, 1024, 2048)[start:]):
        found |= _conv(f"neck.lateral_convs.{i}.conv", 256, inputs, 1, bias=True)
        found |= _conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3, bias=True)
    if extra:
        source = 2048 if extra == "on_input" else 256
        for i, inputs in ((4 - start, source), (5 - start, 256)):
            found |= _conv(f"neck.fpn_convs.{i}.conv", 256, inputs, 3, bias=True)
    return found


def _on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


X101 = _resnet101(64, 4)
PUBLISHED = {
    "retinanet_x101": (X101 | _fpn(1, "on_input"), TORCH, False, False),
    "cascade_mask_rcnn_x101": (X101 | _fpn(0, None), TORCH, False, None),
    "fcos_r101": (_resnet101(1, 64) | _fpn(1, "on_output"), CAFFE, True, True),
    "gfl_r101": (_resnet101(1, 64) | _fpn(1, "on_output"), TORCH, False, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_teachers_by_name_and_shape(name):
    shapes, pixels, caffe, relu = PUBLISHED[name]
    weights = _on_meta(shapes | {"bbox_head.conv.weight": (3, 3)})
    cfg = load_config(str(TEACHERS / f"{name}.yaml"), [])
    converted = convert_mmdet.convert_mmdet(weights, cfg)
    with torch.device("meta"):
        backbone = convert_mmdet.build_backbone(cfg)
    assert converted.keys() == {f"backbone.{key}" for key in backbone.state_dict()}
    used = {id(tensor) for tensor in converted.values()}
    unused = {key for key, tensor in weights.items() if id(tensor) not in used}
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    assert unused == counters | {"bbox_head.conv.weight"}
    assert len(used) == len(converted)

    model = cfg.MODEL
    assert model.RESNETS.STRIDE_IN_1X1 is caffe
    assert getattr(backbone.top_block, "relu", None) is relu
    assert list(model.PIXEL_MEAN) == pixels["mean"]
    assert list(model.PIXEL_STD) == pixels["std"]
    assert (cfg.INPUT.FORMAT == "RGB") is pixels["rgb"]


class GFLHead(nn.Module):
    """mmdet's, of two convolutions a branch."""

    def __init__(self, channels, classes, largest):
        super().__init__()
        for branch in ("cls", "reg"):
            convs = [nn.Module() for _ in range(2)]
            for module in convs:
                module.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                module.gn = nn.GroupNorm(32, channels)
            setattr(self, f"{branch}_convs", nn.ModuleList(convs))
        self.gfl_cls = nn.Conv2d(channels, classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(channels, 4 * (largest + 1), 3, padding=1)
        self.scales = nn.ModuleList(nn.Module() for _ in range(5))
        for scale in self.scales:
            scale.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.integral = nn.Module()
        self.integral.register_buffer("project", torch.arange(largest + 1.0))

    def forward(self, maps):
        found = []
        for x, scale in zip(maps, self.scales):
            scores = edges = x
            for conv in self.cls_convs:
                scores = F.relu(conv.gn(conv.conv(scores)))
            for conv in self.reg_convs:
                edges = F.relu(conv.gn(conv.conv(edges)))
            found.append((self.gfl_cls(scores), scale.scale * self.gfl_reg(edges)))
        return found


GFL = ["MODEL.META_ARCHITECTURE", "GFL", "MODEL.GFL.NUM_CONVS", "2", "MODEL.GFL.REG_MAX", "7"]
SMALL_GFL = [*GFL, "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.GFL.NUM_CLASSES", "3"]


@pytest.fixture(scope="module")
def gfl():
    """Weights by name, mmdet's head, and the configuration."""
    torch.manual_seed(0)
    head = GFLHead(32, 3, 7)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    shapes = _resnet101(1, 64)
    for i, inputs in enumerate((512, 1024, 2048)):
        shapes |= _conv(f"neck.lateral_convs.{i}.conv", 32, inputs, 1, bias=True)
    for i in range(5):
        shapes |= _conv(f"neck.fpn_convs.{i}.conv", 32, 32, 3, bias=True)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights |= {f"bbox_head.{name}": tensor for name, tensor in head.state_dict().items()}
    return weights, head, load_config(str(TEACHERS / "gfl_r101.yaml"), SMALL_GFL)


def test_a_converted_head_of_a_gfl_gives_mmdets_predictions(gfl):
    weights, theirs, cfg = gfl
    converted = convert_mmdet.convert_mmdet(weights, cfg)
    ours = convert_mmdet.instantiate(convert_mmdet.lazy_gfl(cfg).head)
    ours.load_state_dict(
        {name.removeprefix("head."): t for name, t in converted.items() if "head." in name}
    )
    maps = [torch.randn(2, 32, size, size) for size in (8, 4, 2, 2, 2)]
    with torch.no_grad():
        for pair, wanted in zip(zip(*ours(maps)), theirs(maps), strict=True):
            for found, expected in zip(pair, wanted, strict=True):
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("scales.4.scale", (), r"1 missing: bbox_head\.scales\.4\.scale"),
        ("", ("MODEL.GFL.REG_MAX", "16"), r"gfl_reg\.weight \(32, 32, 3, 3\) for \(68, 32"),
    ],
)
def test_a_head_of_another_gfl_is_refused_by_name(gfl, name, overrides, message):
    weights = _without(gfl[0], f"bbox_head.{name}")
    cfg = load_config(str(TEACHERS / "gfl_r101.yaml"), [*SMALL_GFL, *overrides])
    with pytest.raises(WeightsError, match=rf"(?s)\(MODEL\.GFL\)\?.*{message}"):
        convert_mmdet.convert_mmdet(weights, cfg)


def _without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


RETINANET = PUBLISHED["retinanet_x101"][0]
OTHERS = {
    "a weight less": (
        _without(RETINANET, "backbone.layer3.7.bn2.running_var"),
        r"1 missing: backbone\.layer3\.7\.bn2\.running_var",
    ),
    "another width": (
        RETINANET | {"neck.lateral_convs.0.conv.weight": (128, 512, 1, 1)},
        r"1 mismatched: neck\.lateral_convs\.0\.conv\.weight \(128, 512, 1, 1\) for \(256, 512,",
    ),
    "P6 from P5": (X101 | _fpn(1, "on_output"), r"neck\.fpn_convs\.3\.conv\.weight \(256, 256, 3"),
    "P6 by pooling": (X101 | _fpn(1, None), r"4 missing: neck\.fpn_convs\.3\.conv\.weight"),
    "a level more": (X101 | _fpn(0, "on_input"), r"unexpected: neck\.lateral_convs\.3\.conv"),
    "no groups": (_resnet101(1, 64) | _fpn(1, "on_input"), r"layer1\.0\.conv1\.weight \(64, 64,"),
    "a deeper stage": (
        RETINANET | _conv("backbone.layer3.23.conv1", 1024, 1024, 1, bias=False),
        r"1 unexpected: backbone\.layer3\.23\.conv1\.weight",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_model_are_refused_by_name(name):
    shapes, message = OTHERS[name]
    cfg = load_config(str(TEACHERS / "retinanet_x101.yaml"), [])
    with pytest.raises(WeightsError, match=rf"(?s)does it describe this model.*{message}"):
        convert_mmdet.convert_mmdet(_on_meta(shapes), cfg)


def test_a_backbone_without_a_pyramid_is_refused_by_name():
    cfg = load_config(
        str(TEACHERS / "fcos_r101.yaml"), ["MODEL.BACKBONE.NAME", "build_resnet_backbone"]
    )
    with pytest.raises(WeightsError, match=r"missing: stem\.conv1\.weight"):
        convert_mmdet.convert_mmdet(_on_meta(PUBLISHED["fcos_r101"][0]), cfg)


def test_p6_from_another_map_is_refused():
    cfg = load_config(str(TEACHERS / "fcos_r101.yaml"), ["MODEL.FPN.P6P7.IN_FEATURE", "p4"])
    with pytest.raises(ValueError, match=r"P6P7\.IN_FEATURE: expected 'res5' .* got 'p4'"):
        convert_mmdet.convert_mmdet({}, cfg)


@pytest.mark.parametrize("zipped", [True, False])
def test_notes_of_text_and_numbers_are_read(tmp_path, zipped):
    notes = {
        "config": "model = dict(type='RetinaNet')",
        "CLASSES": ("person", "bicycle"),
        "hook_msgs": {"best_score": np.float64(0.41), "seed": np.int64(3)},
        "lr": OrderedDict(a=np.float32(0.5)),
    }
    weights = OrderedDict({"module.backbone.conv1.weight": torch.ones(2)})
    path = tmp_path / "notes.pth"
    torch.save({"meta": notes, "state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    found = convert_mmdet.read_mmdet(path)
    assert found.keys() == {"backbone.conv1.weight"}
    assert torch.equal(found["backbone.conv1.weight"], torch.ones(2))


class _RunsCode:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def test_notes_that_would_run_code_are_refused_with_the_way_out(tmp_path, capfd):
    path = tmp_path / "bad.pth"
    torch.save({"meta": {"hook": _RunsCode()}, "state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"bad\.pth' also holds .*system.*rewrite it once without"):
        convert_mmdet.read_mmdet(path)
    assert "must not run" not in capfd.readouterr().out


def test_the_script_names_the_file_and_what_no_weight_confirms(tmp_path, capsys):
    path, output = tmp_path / "mmdet.pth", tmp_path / "sub" / "converted.pth"
    torch.save({"state_dict": _detector().state_dict()}, path)
    base = str(PROJECT / "configs/detection/coco/schedule_2x.yaml")
    arguments = ["--config-file", base, "--weights", str(path), "--output", str(output)]
    convert_mmdet.main([*arguments, *_overrides()])
    printed = capsys.readouterr().out
    assert "style='pytorch', to_rgb=True, mean=[123.675, 116.28, 103.53]" in printed
    assert "add_extra_convs='on_input', relu_before_extra_convs=False" in printed
    with pytest.raises(WeightsError, match=r"mmdet\.pth: the weights are not those of the conf"):
        convert_mmdet.main([*arguments, *_overrides(start=0, extra=None)])


def test_a_teacher_of_unconverted_weights_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "mmdet.pth"
    torch.save({"meta": {}, "state_dict": {"backbone.conv1.weight": torch.ones(2)}}, path)
    cfg = load_config(str(TEACHERS / "../fcos_r50/from_r101_pcka.yaml"), [])
    cfg.MODEL.DEVICE, cfg.DISTILL.TEACHER.WEIGHTS = "cpu", str(path)
    with pytest.raises(ValueError, match=r"under 'state_dict'.*tools/convert_mmdet\.py"):
        build_teacher(cfg)
