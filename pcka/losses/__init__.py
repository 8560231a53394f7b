# ruff: noqa: F401 (__all__ has the names, from the registry)
"""Losses: pure functions of student and teacher tensors, and a module for each, found by name.

Conventions that all of them share:

- **Dtypes.** Both models' tensors may be of any floating dtype, and their dtypes may differ. Sums
  and results are in float32, or in float64 if either model's tensor is, also under autocast.
- **Gradients.** No gradient reaches the teacher's outputs. (:func:`cc_neighbours_loss` and
  :func:`fgd_relation_loss` compare the outputs of two trained modules and send gradients to both;
  :class:`CC` and :class:`FGD` detach the teacher's features before these modules.)
- **Keywords.** Functions take tensors by position and settings by keyword; modules take only
  settings, by keyword, each with a default.
- **Lists.** Where a list is expected, a string is rejected; a per-stage setting may be a single
  value, bare or in a list, which then applies to all stages.
- **Errors.** A ``ValueError`` names the argument, what was expected and what was passed.

Imports are lazy: ``losses.KD`` and ``losses.build("KD")`` import only what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pcka.losses.base import Context, LogitLoss, Loss, Outputs, StagewiseLoss, Term
from pcka.losses.numerics import DegenerateLevelWarning, standardized_logits
from pcka.losses.registry import (
    MODULE_OF,
    build,
    defaults,
    described,
    find,
    names,
    public,
    register,
)

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ finds the same names
    from pcka.losses.at import AT, at_loss
    from pcka.losses.cc import CC, cc_loss, cc_neighbours_loss
    from pcka.losses.crd import CRD, crd_loss
    from pcka.losses.cross_entropy import CE
    from pcka.losses.crosskd import CrossKD
    from pcka.losses.ctkd import CTKD, ctkd_loss
    from pcka.losses.cwd import CWD, cwd_loss
    from pcka.losses.densekd import DenseKD, dense_boxes_loss, dense_scores_loss
    from pcka.losses.dist import DIST, dist_loss
    from pcka.losses.dkd import DKD, dkd_loss
    from pcka.losses.fcka import FCKA, fcka_loss
    from pcka.losses.fgd import FGD, fgd_loss, fgd_relation_loss
    from pcka.losses.fitnet import FitNet, fitnet_loss
    from pcka.losses.ickd import ICKD, ickd_loss
    from pcka.losses.ifvd import IFVD, ifvd_loss
    from pcka.losses.ikl import IKL, ikl_loss
    from pcka.losses.itrd import ITRD, itrd_loss
    from pcka.losses.kd import KD, kd_loss
    from pcka.losses.kdsvd import KDSVD, kdsvd_loss
    from pcka.losses.lcka import LCKA, lcka_loss
    from pcka.losses.ld import LD, ld_loss
    from pcka.losses.mgd import MGD, mgd_loss
    from pcka.losses.mlkd import MLKD, mlkd_loss
    from pcka.losses.nkd import NKD, nkd_loss
    from pcka.losses.nst import NST, nst_loss
    from pcka.losses.ofd import OFD, ofd_loss
    from pcka.losses.patched import Patched, patched_loss
    from pcka.losses.pcka import PCKA, pcka_loss
    from pcka.losses.pixelcka import PixelCKA, pixel_cka_loss
    from pcka.losses.pixelcwd import PixelCWD
    from pcka.losses.pixelkd import PixelKD, pixel_kd_loss
    from pcka.losses.pkd import PKD, pkd_loss
    from pcka.losses.pkt import PKT, pkt_loss
    from pcka.losses.rcka import RCKA, rcka_loss
    from pcka.losses.reviewkd import ReviewKD, hcl_loss
    from pcka.losses.rkd import RKD, rkd_loss
    from pcka.losses.rld import RLD, rld_loss
    from pcka.losses.roikd import RoIKD, roi_boxes_loss
    from pcka.losses.sp import SP, sp_loss
    from pcka.losses.srrl import SRRL, srrl_loss
    from pcka.losses.vid import VID, vid_loss
    from pcka.losses.vkd import VKD, vkd_loss
    from pcka.losses.wttm import WTTM, wttm_loss
else:
    __getattr__ = public

__all__ = [
    "Context",
    "DegenerateLevelWarning",
    "LogitLoss",
    "Loss",
    "Outputs",
    "StagewiseLoss",
    "Term",
    "build",
    "defaults",
    "described",
    "find",
    "names",
    "register",
    "standardized_logits",
    *MODULE_OF,
]


def __dir__() -> list[str]:
    return sorted(__all__)
