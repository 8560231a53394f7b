"""Batch norms of a trained model, put into the convolutions before them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class _Tracer(fx.Tracer):
    """Looks into what holds batch norms alone: other modules may do what cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not any(
            isinstance(module, nn.BatchNorm2d) for module in m.modules()
        )


def fold_batch_norms(model: nn.Module, tapped: Collection[str] = ()) -> list[str]:
    """Replace, in place, every batch norm that directly follows a convolution by the identity.

    ``BN(Wx + b) = (s W) x + (b - mean) s + beta`` with ``s = gamma / sqrt(var + eps)``: in
    evaluation mode the scale and the shift go into the convolution. Module paths stay as they
    are, so taps do too, and a tap of the batch norm gives what it gave. A tap of the
    *convolution* would give the normalised map.

    Args:
        model: in evaluation mode. One that :func:`torch.fx.symbolic_trace` cannot follow stays as
            it is.
        tapped: paths of modules whose output must stay what it is: a convolution in one of them
            does not take in a batch norm outside it.

    Returns:
        Paths of the batch norms that were folded.

    Raises:
        ValueError: a model in training mode, whose batch norms use the statistics of the batch.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode to fold its batch norms; call .eval()")
    folded = []
    for conv, norm in list(_pairs(model)):
        if any(_within(conv, path) and not _within(norm, path) for path in tapped):
            continue
        fused = fuse_conv_bn_eval(
            cast(nn.Conv2d, model.get_submodule(conv)),
            cast(nn.BatchNorm2d, model.get_submodule(norm)),
        )
        model.set_submodule(conv, fused)
        model.set_submodule(norm, nn.Identity())
        folded.append(norm)
    return folded


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of the convolutions and batch norms of which one feeds the other and nothing else."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # control flow on values, foreign calls: tracing fails in many ways
        return
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = [str(node.target) for node in nodes]
    for node in nodes:
        before = node.args[0] if node.args else None
        if (
            _has_statistics(modules[node.target])
            and isinstance(before, fx.Node)
            and before.op == "call_module"
            and type(modules[before.target]) is nn.Conv2d  # a subclass may change its weight
            and len(before.users) == 1
            and calls.count(str(node.target)) == calls.count(str(before.target)) == 1
        ):
            yield str(before.target), str(node.target)


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _has_statistics(module: nn.Module) -> bool:
    """Without its own, a batch norm takes those of the batch in evaluation mode, too."""
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
