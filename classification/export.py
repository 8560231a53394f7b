"""Export a student: ``python classification/export.py --config-file F --weights W ...``.

``--output`` ends in ``.pth`` or ``.safetensors`` (only the weights, under the names of the
plain model, which ``create_model`` or torchvision's constructor loads) or in ``.onnx``: the graph
from normalised pixels, or with ``--with-normalization`` from pixels in [0, 1], to logits, for
batches of any size. What its images and logits are is printed and, except for ``.pth``, stored in
the file.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from classification.arguments import EXPORTED, export_parser
from classification.batch_norm import recalibrate
from classification.config import default_config, load_config
from classification.data import load_image_sets, pixel_statistics
from classification.models import load_classifier, named_model, settings_of, without_weights
from classification.models.taps import with_stages
from pcka.checkpoint import extract_state_dict, optional_package, save_student
from pcka.engine.arguments import take_pairs
from pcka.engine.class_names import CLASSES_FILE, read_class_names
from pcka.engine.command import run_command
from pcka.engine.config import ConfigError
from pcka.engine.progress import console_log
from pcka.files import CheckpointError, atomic_write, load_file

if TYPE_CHECKING:  # keeps --help fast
    from torch import nn

logger = logging.getLogger("pcka")

ONNX = ".onnx"
EXAMPLE_BATCH = 2  # not 1, which torch.export would treat as a constant
CHECKED_BATCH = 3  # other than the example's
TOLERANCE = 1e-3  # of the largest logit: far above rounding, far below any difference that matters


def export_student(
    cfg: CfgNode,
    weights: str,
    output: str | Path,
    *,
    with_normalization: bool = False,
    recalibrated: int = 0,
) -> Path:
    """Export the student with a checkpoint's weights to ``output``; return its path.

    Args:
        cfg: STUDENT gives the model and its pixel statistics, DATA.IMAGE_SIZE the side of the
            graph's images. DATA.NUM_CLASSES 0 takes the number of classes from the checkpoint.
        weights: checkpoint in any layout that ``pcka.checkpoint`` supports.
        output: file with a suffix of ``EXPORTED``, written atomically.
        with_normalization: the graph begins with the student's pixel normalisation.
        recalibrated: re-estimate batch norm's running statistics on this many training images.

    Raises:
        ConfigError: an unknown format, normalisation without a graph, or a number of classes that
            neither configuration nor checkpoint gives.
        ImportError: a package of the extra ``export`` that the format needs is not installed.
        ValueError: weights that do not fit the student, or a graph whose logits differ from its.
    """
    output = Path(output)
    if output.suffix not in EXPORTED:
        raise ConfigError(f"output: expected one of {', '.join(EXPORTED)}, got {str(output)!r}")
    if with_normalization and output.suffix != ONNX:
        raise ConfigError(
            f"with_normalization: weights alone hold no normalisation, got {str(output)!r}; "
            f"export to {ONNX}, or leave it out"
        )
    classes = cfg.DATA.NUM_CLASSES or _classes_of(cfg, weights)
    settings = settings_of(cfg.STUDENT)
    student = load_classifier(cfg.STUDENT.NAME, weights, classes, role="student", **settings)
    if recalibrated:
        train_set, _ = load_image_sets(cfg)
        recalibrate(student, pixel_statistics(cfg.STUDENT), train_set, cfg, recalibrated)
    about = describe_student(cfg, weights, with_normalization=with_normalization)
    if output.suffix != ONNX:
        save_student(student, output, {"format": "pt", **about})
        return output
    content = _onnx_graph(student, cfg, about, with_normalization)
    atomic_write(lambda file: file.write(content), output)
    return output


def describe_student(
    cfg: CfgNode, weights: str | Path, *, with_normalization: bool = False
) -> dict[str, str]:
    """Return what users of a student must know, as stored in ONNX and safetensors files.

    Args:
        cfg: STUDENT and DATA.IMAGE_SIZE are read.
        weights: a file in the folder of a run, whose ``classes.txt`` names the classes.
        with_normalization: whether the model takes pixels in [0, 1] instead of normalised ones.

    Returns:
        ``model``, ``image_size``, ``pixels`` (how they are made from RGB in [0, 1]) and, if known,
        ``classes``, a JSON list in the order of the logits.
    """
    mean, std = list(cfg.STUDENT.PIXEL_MEAN), list(cfg.STUDENT.PIXEL_STD)
    about = {
        "model": cfg.STUDENT.NAME,
        "image_size": str(cfg.DATA.IMAGE_SIZE),
        "pixels": "RGB in [0, 1]" + f" less {mean}, over {std}" * (not with_normalization),
    }
    file = Path(weights).with_name(CLASSES_FILE)
    if file.is_file():
        about["classes"] = json.dumps(read_class_names(file))
    return about


def _classes_of(cfg: CfgNode, weights: str) -> int:
    """Return the number of classes of a checkpoint's classifier."""
    name = cfg.STUDENT.NAME
    model = named_model(name, 1, role="student", **without_weights(cfg.STUDENT))
    if not model.classifier_name:
        model = with_stages(model, cfg.DATA.IMAGE_SIZE)
    classifier = f"{model.classifier_name}.weight"
    try:
        state = extract_state_dict(load_file(weights), own=model.state_dict())
    except CheckpointError as error:
        raise ConfigError(f"weights: {weights!r}: {error}") from error
    if classifier not in state or state[classifier].dim() == 0:
        raise ConfigError(
            f"DATA.NUM_CLASSES: not known from {weights!r} (it has no {classifier!r} of a "
            f"{name}); set it to the number of classes that the student was trained on"
        )
    return len(state[classifier])


def _onnx_graph(
    student: nn.Module, cfg: CfgNode, about: Mapping[str, str], with_normalization: bool
) -> bytes:
    """Return the serialised graph: ``images`` (batch, 3, S, S) -> ``logits`` (batch, classes)."""
    import torch
    from torch import nn

    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional_package(package)
    pixels = pixel_statistics(cfg.STUDENT) if with_normalization else nn.Identity()
    model = nn.Sequential(OrderedDict(pixels=pixels, model=student)).eval()
    side = cfg.DATA.IMAGE_SIZE
    program = torch.onnx.export(
        model,
        (torch.zeros(EXAMPLE_BATCH, 3, side, side),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # guaranteed by dynamo=True
    graph = program.model_proto
    for key, value in about.items():
        graph.metadata_props.add(key=key, value=value)
    content = graph.SerializeToString()
    _check_graph(content, model, side)
    return content


def _check_graph(content: bytes, model: nn.Module, side: int) -> None:
    """Compare a graph, run by onnxruntime, with its model; log the largest difference.

    Raises:
        ValueError: their logits on random images differ by more than rounding.
    """
    import torch

    images = torch.rand(CHECKED_BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
    session = optional_package("onnxruntime").InferenceSession(content)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = model(images)
    difference = (torch.from_numpy(logits) - expected).abs().max().item()
    said = f"logits of {len(images)} random images differ from the model's by at most"
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"onnxruntime: the graph's {said} {difference:.1e}; nothing was written")
    logger.info("onnxruntime: the graph's %s %.1e", said, difference)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Export as the arguments say; return the file's path."""
    words, pairs = take_pairs(sys.argv[1:] if arguments is None else arguments, default_config())
    given = export_parser().parse_intermixed_args(words)
    cfg = load_config(given.config_file, [*pairs, *given.overrides])
    for chatty in ("onnxscript", "onnx_ir"):  # they log every rewrite of the graph
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with console_log():
        path = export_student(
            cfg,
            given.weights,
            given.output,
            with_normalization=given.with_normalization,
            recalibrated=given.recalibrate_bn,
        )
    print(f"{path}: {cfg.STUDENT.NAME}, {path.stat().st_size / 1e6:.2f} MB")
    about = describe_student(cfg, given.weights, with_normalization=given.with_normalization)
    for key in ("image_size", "pixels", "classes"):
        print(f"  {key}: {about.get(key, 'unknown')}")
    return path


if __name__ == "__main__":
    run_command(main)
