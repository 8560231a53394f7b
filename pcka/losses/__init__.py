"""Losses: pure functions of student and teacher tensors, and a module of each, by name."""

from __future__ import annotations

from pcka.losses.base import Loss
from pcka.losses.cross_entropy import CE
from pcka.losses.cwd import CWD, cwd_loss
from pcka.losses.degenerate import DegenerateLevelWarning
from pcka.losses.fcka import FCKA, fcka_loss
from pcka.losses.fitnet import FITNET, fitnet_loss
from pcka.losses.kd import KD, kd_loss
from pcka.losses.lcka import LCKA, lcka_loss
from pcka.losses.outputs import Outputs
from pcka.losses.pcka import PCKA, pcka_loss
from pcka.losses.pkd import PKD, pkd_loss
from pcka.losses.rcka import RCKA, rcka_loss
from pcka.losses.registry import build, defaults, names, register

__all__ = [
    "CE",
    "CWD",
    "FCKA",
    "FITNET",
    "KD",
    "LCKA",
    "PCKA",
    "PKD",
    "RCKA",
    "DegenerateLevelWarning",
    "Loss",
    "Outputs",
    "build",
    "cwd_loss",
    "defaults",
    "fcka_loss",
    "fitnet_loss",
    "kd_loss",
    "lcka_loss",
    "names",
    "pcka_loss",
    "pkd_loss",
    "rcka_loss",
    "register",
]
