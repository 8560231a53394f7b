"""Convert a teacher's weights from OpenMMLab's mmdet to detectron2's names.

``python tools/convert_mmdet.py --config-file TEACHER.yaml --weights X.pth --output Y.pth``

Backbone and neck are converted (a ResNet or ResNeXt, and an FPN whose P6 is pooled, or whose P6 and
P7 are convolutions), and the head of a GFL. ``TEACHER.yaml`` describes the model, and every weight
must fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_backbone
from torch import Tensor

import detection.backbones  # noqa: F401  (registers itself)
from detection.checkpoint import WeightsError
from detection.config import load_config
from detection.gfl import lazy_gfl
from pcka.checkpoint import compare_shapes, extract_state_dict
from pcka.engine.arguments import command_parser
from pcka.engine.command import run_command
from pcka.files import atomic_save, load_file

PARTS = ("backbone.", "neck.")
HEAD = "bbox_head."
COUNTER = "num_batches_tracked"  # of batch norm; detectron2's frozen version has none


def convert_mmdet(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Return the weights of backbone and neck, and of a GFL's head, under detectron2's names.

    Args:
        weights: mmdet's name -> tensor; other heads are left out, as is a GFL's without
            ``gfl_cls``.
        cfg: configuration of the teacher.

    Raises:
        WeightsError: a weight of the teacher's backbone or GFL head is missing or has another
            shape, or mmdet's backbone, neck or head holds one that the teacher has no place for.
    """
    with torch.device("meta"):  # only names and shapes are needed
        own = build_backbone(cfg).state_dict()
    laterals = re.findall(r"fpn_lateral(\d)", " ".join(own))
    names = {name: mmdet_name(name, int(min(laterals, default="0"))) for name in own}
    wanted = {theirs: tuple(own[name].shape) for name, theirs in names.items()}
    given = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if name.startswith(PARTS) and (name in wanted or not name.endswith(COUNTER))
    }
    report = compare_shapes(given, wanted, layout="mmdet's")
    if not report.complete:
        raise WeightsError(
            "the weights are not those of the configuration's backbone; does it describe this "
            f"model (MODEL.BACKBONE, MODEL.RESNETS, MODEL.FPN)? {report}"
        )
    backbone = {f"backbone.{name}": weights[theirs] for name, theirs in names.items()}
    with_head = cfg.MODEL.META_ARCHITECTURE == "GFL" and f"{HEAD}gfl_cls.weight" in weights
    return backbone | (_gfl_head(weights, cfg) if with_head else {})


def _gfl_head(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """The head's weights; only detectron2 has biases in convolutions before norms."""
    with torch.device("meta"):
        own = instantiate(lazy_gfl(cfg).head).state_dict()
    scales = [f"{HEAD}scales.{level}.scale" for level in range(len(own.pop("scales")))]
    names = {name: _gfl_name(name, normed=bool(cfg.MODEL.GFL.NORM)) for name in own}
    wanted = {name: tuple(own[key].shape) for key, name in names.items() if name}
    wanted |= dict.fromkeys(scales, ())
    given = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if name.startswith(HEAD) and name != f"{HEAD}integral.project"  # the distances themselves
    }
    report = compare_shapes(given, wanted, layout="mmdet's")
    if not report.complete:
        raise WeightsError(
            "the weights are not those of the configuration's head; does it describe this model "
            f"(MODEL.GFL)? {report}"
        )
    found = {
        key: weights[name] if name else torch.zeros(own[key].shape) for key, name in names.items()
    }
    found["scales"] = torch.stack([weights[name] for name in scales])
    return {f"head.{name}": tensor for name, tensor in found.items()}


def _gfl_name(name: str, *, normed: bool) -> str:
    """mmdet's name for a weight of a GFL head; "" if it has no such weight."""
    if not (layer := re.match(r"(cls|bbox)_subnet\.(\d+)\.(weight|bias)", name)):
        return HEAD + name.replace("cls_score", "gfl_cls").replace("bbox_pred", "gfl_reg")
    number, place = divmod(int(layer[2]), 3 if normed else 2)
    if normed and place == 0 and layer[3] == "bias":
        return ""
    branch = {"cls": "cls", "bbox": "reg"}[layer[1]]
    return f"{HEAD}{branch}_convs.{number}.{('conv', 'gn')[place]}.{layer[3]}"


def mmdet_name(name: str, first_level: int) -> str:
    """mmdet's name for a weight of detectron2's ResNet with FPN.

    Args:
        name: as in the backbone's ``state_dict``, e.g. ``"fpn_lateral3.weight"``.
        first_level: the pyramid's finest level, from which mmdet counts the neck's convolutions.
    """
    name = re.sub(r"^bottom_up\.(stem\.)?", "backbone.", name)
    name = re.sub(r"\bres(\d)", lambda found: f"layer{int(found[1]) - 1}", name)
    name = re.sub(r"\bconv(\d)\.norm\b", r"bn\1", name)
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    name = re.sub(
        r"^(fpn_lateral|fpn_output|top_block\.p)(\d)",
        lambda found: (
            f"neck.{'lateral' if 'lateral' in found[1] else 'fpn'}_convs."
            f"{int(found[2]) - first_level}.conv"
        ),
        name,
    )
    return name.replace("conv.norm", "bn")


def read_mmdet(path: str | Path) -> dict[str, Tensor]:
    """Return all weights of an mmdet checkpoint, without running code that it may contain.

    Besides the weights, a file holds a dict of training metadata. Text, numbers and NumPy's numbers
    are read; anything else is refused, with instructions for extracting the weights.

    Raises:
        ValueError: the file holds other objects, or no weights.
        OSError: it cannot be opened.
    """
    numbers = [np.dtype(kind) for kind in (np.float32, np.float64, np.int64)]
    scalar = np.float64(0).__reduce__()[0]  # numpy moved it; files use either name
    moved = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*moved, np.dtype, *map(type, numbers)]):
        return extract_state_dict(load_file(path))


def beyond_weights(cfg: CfgNode) -> str:
    """Settings that the weights cannot confirm, in the terms of mmdet's configurations."""
    settings: dict[str, object] = {
        "style": "caffe" if cfg.MODEL.RESNETS.STRIDE_IN_1X1 else "pytorch",
        "to_rgb": cfg.INPUT.FORMAT == "RGB",
        "mean": list(cfg.MODEL.PIXEL_MEAN),
        "std": list(cfg.MODEL.PIXEL_STD),
    }
    own = cfg.MODEL.FPN.P6P7
    source, relu = {
        "build_p6p7_resnet_fpn_backbone": (own.IN_FEATURE, own.RELU),
        "build_retinanet_resnet_fpn_backbone": ("res5", True),
    }.get(cfg.MODEL.BACKBONE.NAME, (None, False))
    settings["add_extra_convs"] = {"res5": "on_input", "p5": "on_output"}.get(source, False)
    settings["relu_before_extra_convs"] = relu
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert weights as the arguments specify."""
    parser = command_parser("mmdet's weights for a detectron2 teacher.")
    parser.add_argument("--config-file", metavar="F", required=True, help="teacher configuration")
    parser.add_argument("--weights", metavar="X", required=True, help="mmdet checkpoint")
    parser.add_argument("--output", metavar="Y", required=True, help="detectron2 checkpoint")
    parser.add_argument("overrides", metavar="KEY VALUE", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    cfg = load_config(given.config_file, given.overrides)
    try:
        converted = convert_mmdet(read_mmdet(given.weights), cfg)
    except WeightsError as error:
        raise WeightsError(f"{given.weights}: {error}") from error
    atomic_save({"model": converted}, given.output)
    print(f"{given.output}: {len(converted)} weights of backbone, neck and GFL head")
    print(f"No weight confirms these settings; compare with mmdet's own: {beyond_weights(cfg)}")


if __name__ == "__main__":
    run_command(main)
