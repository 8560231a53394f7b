"""Weight initialisation shared by the model families."""

from __future__ import annotations

from torch import nn


def initialize_convolutions(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out) and zero its bias.

    Normalisation and linear layers keep torch's defaults.

    Source: He et al., Delving Deep into Rectifiers, ICCV 2015, section 2.2 (backward case).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_classifier(linear: nn.Linear) -> None:
    """Draw the weights from N(0, 0.01^2) and zero the bias, as the VGGs and MobileNetV2 do."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
