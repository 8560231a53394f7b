"""A frozen teacher, which runs faster for it; several teachers as one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import Self

from pcka.taps import LogitsOf, Observer, find_logits


class FrozenTeacher(nn.Module):
    """A trained model for inference only: always in eval mode, no gradients, no graph.

    ``model`` is used directly, not copied: its parameters stop requiring grad, and it is put into
    eval mode.

    Args:
        model: the trained teacher, inputs -> outputs.
        channels_last: convert the weights and the images to channels-last memory format.
        fold_batch_norm: fold batch norms into the convolutions before them
            (:func:`fold_batch_norms`): faster, with the same outputs up to rounding.
        tapped: paths of modules that taps will read; folding leaves their outputs unchanged.
        logits_of: where its logits are, as for :func:`pcka.taps.find_logits`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        channels_last: bool = False,
        fold_batch_norm: bool = False,
        tapped: Collection[str] = (),
        logits_of: LogitsOf | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        if fold_batch_norm:
            fold_batch_norms(self.model, tapped)
        self.logits_of = logits_of
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` asks for."""
        return super().train(False)

    # Not inference_mode: autograd refuses to save its tensors, and losses multiply by them.
    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """Run the model on its inputs, such as images ``(B, C, H, W)``, without a graph."""
        if any(module.training for module in self.model.modules()):  # their holder called train()
            self.eval()
        if self.channels_last:
            inputs = tuple(map(_channels_last, inputs))
        return self.model(*inputs)

    def observer(self, paths: Mapping[str, str], *, compile: bool = False) -> Observer:
        """The teacher with taps on its model.

        Args:
            paths: tap name -> path in ``model``.
            compile: as in :class:`Observer`.
        """
        return Observer(self, paths, root=self.model, logits_of=self.logits_of, compile=compile)


class Ensemble(nn.Module):
    """Several trained models as one teacher: the weighted mean of their logits.

    ``z = sum_k w_k z_k`` with ``w_k = shares[k] / sum(shares)``. At every temperature its
    probabilities are the weighted geometric mean of the members', normalised:
    ``softmax(z / T)`` is proportional to ``prod_k softmax(z_k / T)^w_k`` (Hinton et al. 2015,
    arXiv:1503.02531, mention it alongside the arithmetic mean for ensembles).

    Taps read one member: ``members.0.layer3`` is the path of the first one's ``layer3``.

    Args:
        members: inputs -> an output that :func:`pcka.taps.find_logits` searches; all logits have
            one shape.
        shares: share of each member in the mean, above 0; equal if None.
        inputs: one module per member, which makes its input from the ensemble's (its own pixel
            statistics, another size); if None, the input as it is.
        logits_of: where the logits of all members are, as for :func:`pcka.taps.find_logits`.

    Raises:
        ValueError: there are no members, or the shares or inputs do not match them.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        shares: Sequence[float] | None = None,
        *,
        inputs: Sequence[nn.Module] | None = None,
        logits_of: LogitsOf | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: expected one or more models, got none")
        shares = [1.0] * len(members) if shares is None else list(shares)
        if len(shares) != len(members) or not all(0 < share < float("inf") for share in shares):
            raise ValueError(
                f"shares: expected {len(members)} numbers above 0, one per member, got {shares}"
            )
        if inputs is not None and len(inputs) != len(members):
            raise ValueError(
                f"inputs: expected {len(members)} modules, one per member, got {len(inputs)}"
            )
        self.members = nn.ModuleList(members)
        self.inputs = nn.ModuleList(inputs or [nn.Identity() for _ in members])
        self.shares = [share / sum(shares) for share in shares]
        self.logits_of = logits_of

    def forward(self, images: Any) -> Tensor:
        """The mean of the members' logits, ``(B, P)``.

        Raises:
            ValueError: a member returns no logits, or logits of another shape than the first one's.
        """
        mean: Tensor | None = None
        for index, (share, own, member) in enumerate(
            zip(self.shares, self.inputs, self.members, strict=True)
        ):
            logits = find_logits(member(own(images)), self.logits_of)
            if logits is None or (mean is not None and logits.shape != mean.shape):
                got = "none" if logits is None else tuple(logits.shape)
                wanted = "(B, P)" if mean is None else tuple(mean.shape)
                raise ValueError(
                    f"members: expected logits {wanted} from member {index} "
                    f"({type(member).__name__}), got {got}; all need the same classes, and "
                    "logits_of says where the logits are"
                )
            mean = share * logits if mean is None else mean + share * logits
        assert mean is not None  # there are members
        return mean


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


class _Tracer(fx.Tracer):
    """Traces only into modules that contain batch norms: others may be untraceable."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not any(
            isinstance(module, nn.BatchNorm2d) for module in m.modules()
        )


def fold_batch_norms(model: nn.Module, tapped: Collection[str] = ()) -> list[str]:
    """Replace, in place, every batch norm that directly follows a convolution by the identity.

    ``BN(Wx + b) = (s W) x + (b - mean) s + beta`` with ``s = gamma / sqrt(var + eps)``: in
    evaluation mode the scale and the shift go into the convolution. Module paths stay as they
    are, so taps do too, and a tap on the batch norm reads what it read before. A tap on the
    *convolution* would read the normalised map. Layers with hooks, or whose weights the model reads
    elsewhere as well, stay as they are.

    Args:
        model: in evaluation mode. One that :func:`torch.fx.symbolic_trace` cannot trace stays as it
            is.
        tapped: paths of modules whose output must not change: a convolution in one of them does not
            absorb a batch norm outside it.

    Returns:
        Paths of the folded batch norms.

    Raises:
        ValueError: the model is in training mode, where batch norms use the batch's statistics.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode to fold its batch norms; call .eval()")
    if isinstance(model, Ensemble):  # what it does with their logits cannot be traced
        return [
            f"{prefix}{norm}"
            for prefix, member in _members(model)
            for norm in fold_batch_norms(member, [p.removeprefix(prefix) for p in tapped])
        ]
    folded = []
    kept = [path.partition(":")[0] for path in tapped]
    for conv, norm in list(_pairs(model)):
        if any(_within(conv, path) and not _within(norm, path) for path in kept):
            continue
        fused = fuse_conv_bn_eval(
            cast(nn.Conv2d, model.get_submodule(conv)),
            cast(nn.BatchNorm2d, model.get_submodule(norm)),
        )
        model.set_submodule(conv, fused)
        model.set_submodule(norm, nn.Identity())
        folded.append(norm)
    return folded


def _members(ensemble: Ensemble) -> Iterator[tuple[str, nn.Module]]:
    """The path prefix of each member, and the member."""
    for index, member in enumerate(ensemble.members):
        yield f"members.{index}.", member


def _pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of each convolution whose output only feeds a batch norm, and of that batch norm."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # data-dependent control flow, foreign calls: tracing fails in many ways
        return
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = [str(node.target) for node in nodes]
    read = [str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    for node in nodes:
        before, norm = node.args[0] if node.args else None, modules[node.target]
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.running_mean is not None  # else it uses the batch's statistics
            and isinstance(before, fx.Node)
            and before.op == "call_module"
            and type(modules[before.target]) is nn.Conv2d  # a subclass may change its weight
            and len(before.users) == 1
            and calls.count(str(node.target)) == calls.count(str(before.target)) == 1
            and not any(name in read for name in (node.target, before.target))
            and not any(map(_has_hooks, (norm, modules[before.target])))
        ):
            yield str(before.target), str(node.target)


def _has_hooks(module: nn.Module) -> bool:
    """Whether something sees or changes what the module takes or gives, as pruning does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
