"""Losses: pure functions of student and teacher tensors, and a module of each, by name."""

from __future__ import annotations

from pcka.losses.at import AT, at_loss
from pcka.losses.base import Loss
from pcka.losses.cc import CC, cc_loss
from pcka.losses.cross_entropy import CE
from pcka.losses.cwd import CWD, cwd_loss
from pcka.losses.degenerate import DegenerateLevelWarning
from pcka.losses.dist import DIST, dist_loss
from pcka.losses.dkd import DKD, dkd_loss
from pcka.losses.fcka import FCKA, fcka_loss
from pcka.losses.fitnet import FITNET, fitnet_loss
from pcka.losses.kd import KD, kd_loss
from pcka.losses.lcka import LCKA, lcka_loss
from pcka.losses.nkd import NKD, nkd_loss
from pcka.losses.nst import NST, nst_loss
from pcka.losses.outputs import Outputs
from pcka.losses.pcka import PCKA, pcka_loss
from pcka.losses.pkd import PKD, pkd_loss
from pcka.losses.pkt import PKT, pkt_loss
from pcka.losses.rcka import RCKA, rcka_loss
from pcka.losses.registry import build, defaults, names, register
from pcka.losses.rkd import RKD, rkd_loss
from pcka.losses.sp import SP, sp_loss

__all__ = [
    "AT",
    "CC",
    "CE",
    "CWD",
    "DIST",
    "DKD",
    "FCKA",
    "FITNET",
    "KD",
    "LCKA",
    "NKD",
    "NST",
    "PCKA",
    "PKD",
    "PKT",
    "RCKA",
    "RKD",
    "SP",
    "DegenerateLevelWarning",
    "Loss",
    "Outputs",
    "at_loss",
    "build",
    "cc_loss",
    "cwd_loss",
    "defaults",
    "dist_loss",
    "dkd_loss",
    "fcka_loss",
    "fitnet_loss",
    "kd_loss",
    "lcka_loss",
    "names",
    "nkd_loss",
    "nst_loss",
    "pcka_loss",
    "pkd_loss",
    "pkt_loss",
    "rcka_loss",
    "register",
    "rkd_loss",
    "sp_loss",
]
