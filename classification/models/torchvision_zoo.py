"""torchvision's classification models as `torchvision/<name>`, with the paths that losses tap.

Parameters keep torchvision's names, so that its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.resnet import BasicBlock, Bottleneck

from classification.models.registry import register
from pcka.taps import INPUT_SUFFIX

PREFIX = "torchvision/"
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
MOBILENET_V2_ROWS = (3, 6, 13, 17)  # the last block of each resolution

Stages = Iterator[tuple[str, str, str]]
"""For each stage: its path, its path before the activation, and that of the norm before it."""


class BasicStageEnd(BasicBlock):
    """torchvision's block with a separate last activation, not in place, that can be tapped."""

    last_norm = "bn2"
    last_relu: nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C', H / stride, W / stride)`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.relu(self.bn1(self.conv1(x)))
        return self.last_relu(self.bn2(self.conv2(branch)) + shortcut)


class BottleneckStageEnd(Bottleneck):
    """torchvision's block with a separate last activation, not in place, that can be tapped."""

    last_norm = "bn3"
    last_relu: nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C', H / stride, W / stride)`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        return self.last_relu(self.bn3(self.conv3(branch)) + shortcut)


def _resnet_stages(model: Any) -> Stages:
    """Yield stem and layers; the layers' last blocks change class, not parameters."""
    model.relu.inplace = False
    yield "relu", "relu:input", "bn1"
    for name in ("layer1", "layer2", "layer3", "layer4"):
        *before, block = getattr(model, name)
        block.__class__ = BasicStageEnd if isinstance(block, BasicBlock) else BottleneckStageEnd
        block.last_relu = nn.ReLU()
        last = f"{name}.{len(before)}"
        yield name, f"{last}.last_relu{INPUT_SUFFIX}", f"{last}.{block.last_norm}"


def _mobilenet_v2_stages(model: Any) -> Stages:
    """Yield stem and last rows; these end linearly, so a row is also its pre-activation feature."""
    model.features[0][2].inplace = False
    yield "features.0", f"features.0.2{INPUT_SUFFIX}", "features.0.1"
    for index in MOBILENET_V2_ROWS:
        yield f"features.{index}", f"features.{index}", f"features.{index}.conv.3"


def _vgg_stages(model: Any) -> Stages:
    """Yield the activations before the pooling layers."""
    for index, (activation, following) in enumerate(pairwise(model.features)):
        if isinstance(following, nn.MaxPool2d):
            activation.inplace = False
            has_norm = isinstance(model.features[index - 1], nn.BatchNorm2d)
            path = f"features.{index}"
            yield path, f"{path}{INPUT_SUFFIX}", f"features.{index - 1}" if has_norm else ""


STAGES: dict[type[nn.Module], Callable[[Any], Stages]] = {
    torchvision.models.ResNet: _resnet_stages,
    torchvision.models.MobileNetV2: _mobilenet_v2_stages,
    torchvision.models.VGG: _vgg_stages,
}


def _name_taps(model: Any) -> nn.Module:
    """Set the attributes of `Classifier` on a torchvision model."""
    stages = list(STAGES[type(model)](model)) if type(model) in STAGES else []
    model.stage_names = tuple(stage for stage, _, _ in stages)
    model.preactivation_names = tuple(path for _, path, _ in stages)
    model.preactivation_norms = tuple(norm for _, _, norm in stages)
    model.classifier_name, model.pooled_name = _classifier_paths(model)
    return model


def _classifier_paths(model: nn.Module) -> tuple[str, str]:
    """Return the paths of the last linear layer and of its input, before any preceding dropout."""
    modules = list(model.named_modules())
    linear = [index for index, (_, module) in enumerate(modules) if isinstance(module, nn.Linear)]
    if not linear:
        return "", ""
    (before, dropout), (classifier, _) = modules[linear[-1] - 1 : linear[-1] + 1]
    # Outside an `nn.Sequential`, other code may run between the two.
    if isinstance(dropout, nn.Dropout) and "." in classifier:
        dropout.inplace = False
        return classifier, before + INPUT_SUFFIX
    return classifier, classifier + INPUT_SUFFIX


def _create(name: str, num_classes: int, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a torchvision model; `pretrained=True` loads torchvision's default weights for it."""
    has_heads = name in WITH_AUXILIARY_HEADS
    # Their published weights expect another normalisation, which the models then apply.
    keywords = {"transform_input": True, "init_weights": True} if has_heads else {}
    model = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **keywords, **kwargs
    )
    if has_heads:  # only logits in training, too; the heads stay, because checkpoints have them
        model.aux_logits = False
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, head):
                getattr(model, head).requires_grad_(False)
    if pretrained:
        _load_published(model, name)
    return _name_taps(model)


def published(name: str) -> WeightsEnum:
    """Return torchvision's default weights of the model `<name>`, with what it says about them."""
    weights: WeightsEnum = torchvision.models.get_model_weights(name)["DEFAULT"]
    return weights


def _load_published(model: nn.Module, name: str) -> None:
    """Load all of torchvision's weights but the layers of other classes, which stay random."""
    own, weights = model.state_dict(), published(name)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"kwargs: torchvision cannot load {weights}: {error}") from error
    classes = len(weights.meta["categories"])
    others = {key for key in state.keys() & own.keys() if state[key].shape != own[key].shape}
    of_classes = {
        key
        for key in others
        if len(state[key]) == classes and state[key].shape[1:] == own[key].shape[1:]
    }
    if unlike := sorted((state.keys() ^ own.keys()) | (others - of_classes)):
        raise ValueError(
            f"kwargs: {weights} do not fit this {name}: {unlike[0]} differs; leave out pretrained, "
            "or the other keywords"
        )
    model.load_state_dict({**state, **{key: own[key] for key in of_classes}})


for _name in torchvision.models.list_models(module=torchvision.models):
    register(PREFIX + _name)(partial(_create, _name))
