"""Losses: pure functions of student and teacher tensors, and a module of each, by name."""

from __future__ import annotations

from pcka.losses.at import AT, at_loss
from pcka.losses.base import Loss
from pcka.losses.cc import CC, cc_loss, cc_neighbours_loss
from pcka.losses.crd import CRD, crd_loss
from pcka.losses.cross_entropy import CE
from pcka.losses.cwd import CWD, cwd_loss
from pcka.losses.degenerate import DegenerateLevelWarning
from pcka.losses.dist import DIST, dist_loss
from pcka.losses.dkd import DKD, dkd_loss
from pcka.losses.fcka import FCKA, fcka_loss
from pcka.losses.fitnet import FITNET, fitnet_loss
from pcka.losses.ickd import ICKD, ickd_loss
from pcka.losses.ikl import IKL, ikl_loss
from pcka.losses.kd import KD, kd_loss
from pcka.losses.kdsvd import KDSVD, kdsvd_loss
from pcka.losses.lcka import LCKA, lcka_loss
from pcka.losses.logitwise import standardized_logits
from pcka.losses.mgd import MGD, mgd_loss
from pcka.losses.nkd import NKD, nkd_loss
from pcka.losses.nst import NST, nst_loss
from pcka.losses.ofd import OFD, ofd_loss
from pcka.losses.outputs import Context, Outputs
from pcka.losses.patched import PATCHED, patched_loss
from pcka.losses.pcka import PCKA, pcka_loss
from pcka.losses.pkd import PKD, pkd_loss
from pcka.losses.pkt import PKT, pkt_loss
from pcka.losses.rcka import RCKA, rcka_loss
from pcka.losses.registry import build, defaults, names, register
from pcka.losses.reviewkd import REVIEWKD, hcl_loss
from pcka.losses.rkd import RKD, rkd_loss
from pcka.losses.sp import SP, sp_loss
from pcka.losses.srrl import SRRL, srrl_loss
from pcka.losses.vid import VID, vid_loss
from pcka.losses.wttm import WTTM, wttm_loss

__all__ = [
    "AT",
    "CC",
    "CE",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FCKA",
    "FITNET",
    "ICKD",
    "IKL",
    "KD",
    "KDSVD",
    "LCKA",
    "MGD",
    "NKD",
    "NST",
    "OFD",
    "PATCHED",
    "PCKA",
    "PKD",
    "PKT",
    "RCKA",
    "REVIEWKD",
    "RKD",
    "SP",
    "SRRL",
    "VID",
    "WTTM",
    "Context",
    "DegenerateLevelWarning",
    "Loss",
    "Outputs",
    "at_loss",
    "build",
    "cc_loss",
    "cc_neighbours_loss",
    "crd_loss",
    "cwd_loss",
    "defaults",
    "dist_loss",
    "dkd_loss",
    "fcka_loss",
    "fitnet_loss",
    "hcl_loss",
    "ickd_loss",
    "ikl_loss",
    "kd_loss",
    "kdsvd_loss",
    "lcka_loss",
    "mgd_loss",
    "names",
    "nkd_loss",
    "nst_loss",
    "ofd_loss",
    "patched_loss",
    "pcka_loss",
    "pkd_loss",
    "pkt_loss",
    "rcka_loss",
    "register",
    "rkd_loss",
    "sp_loss",
    "srrl_loss",
    "standardized_logits",
    "vid_loss",
    "wttm_loss",
]
