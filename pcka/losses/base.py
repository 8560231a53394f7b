"""What every loss module is."""

from __future__ import annotations

from torch import Tensor, nn

from pcka.losses.outputs import Context, Outputs

NO_CONTEXT = Context()


class Loss(nn.Module):
    """A distillation or task loss: outputs of both models and the target -> named, weighted terms.

    Subclasses take keyword-only arguments, each with a default that YAML can hold, and say what
    they need in these attributes. Parameters made in :meth:`prepare` are trained with the student;
    buffers are saved and resumed.

    Attributes:
        taps: names of the features read from ``Outputs.features``.
        needs_teacher: ``forward`` needs the teacher's outputs.
        needs_target: ``forward`` needs the target.
        needs_logits: ``forward`` needs both models' logits.
        needs_indices: ``forward`` needs ``student.indices``.
        needs_context: ``prepare`` needs a part of its ``context``.
        capturable: ``forward`` can be recorded in a CUDA graph and replayed: it waits for no value
            of a tensor, and keeps no state but in its buffers, which it changes in place.
        relational: the loss is no mean over samples: it relates the samples of a batch to one
            another, and in several processes has to see the batches of all of them.
    """

    taps: tuple[str, ...] = ()
    needs_teacher: bool = True
    needs_target: bool = False
    needs_logits: bool = False
    needs_indices: bool = False
    needs_context: bool = False
    capturable: bool = True
    relational: bool = False

    def prepare(
        self, student: Outputs, teacher: Outputs | None, context: Context = NO_CONTEXT
    ) -> None:
        """Make the parts whose size depends on the models (adapters), from one dry run of both.

        Called once, before the optimizer is made; most losses have nothing to prepare.

        Args:
            student: outputs of the student on any batch; only their shapes, dtypes and device
                count.
            teacher: outputs of the teacher on the same batch, or None without a teacher.
            context: of the run.
        """

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor | None
    ) -> dict[str, Tensor]:
        """Terms named ``loss_...``, each a scalar already multiplied by its weight."""
        raise NotImplementedError
