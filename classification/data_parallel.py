"""A student that several processes train together."""

from __future__ import annotations

from fvcore.common.config import CfgNode
from torch.nn.parallel import DistributedDataParallel

from classification.data import ImageSet
from classification.preflight import tried_inputs
from pcka.distiller import Distiller
from pcka.distributed import OWN_BUFFERS, world_size
from pcka.engine.environment import autocast
from pcka.engine.preflight import untrained_parameters


def data_parallel(
    cfg: CfgNode, distiller: Distiller, train_set: ImageSet
) -> DistributedDataParallel:
    """Average gradients over processes; every process keeps the buffers that it computes.

    Processes wait for the gradient of every parameter. Whether some get none is found out once, in
    a trial with a few images; only then is each step searched for them.

    Args:
        cfg: of the run.
        distiller: on the training device, with its losses prepared.
        train_set: on that device.
    """
    tried = tried_inputs(cfg, train_set, cfg.SOLVER.BATCH_SIZE // world_size())
    with autocast(cfg.AUTOCAST, train_set.device):
        without = untrained_parameters(distiller, **tried)
    return DistributedDataParallel(distiller, find_unused_parameters=bool(without), **OWN_BUFFERS)
