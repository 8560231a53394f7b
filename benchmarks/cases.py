"""The measured cases: named maps and matrices at the sizes of real training."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student and a teacher of one shape.

    Args:
        name: its name on the command line and in the tables.
        shape: shape of both tensors.
        dtype: dtype of both tensors.
        channels_last: whether the maps have this memory layout.
        both: whether the teacher gets a gradient too, as from :func:`pcka.cka`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    both: bool = False

    @property
    def rows(self) -> tuple[int, int, int]:
        """``(G, N, D)``: groups, rows and columns of what is aligned."""
        raise NotImplementedError

    @property
    def columns(self) -> bool:
        """Whether the ``D x D`` Grams are aligned instead of the ``N x N`` ones."""
        return False

    @property
    def student_bytes(self) -> int:
        """Bytes of the student; the teacher and each gradient have as many."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        return self.student_bytes * (2 if self.both else 1)

    def quick(self) -> Case:
        """The same kind of work at a size that takes milliseconds."""
        raise NotImplementedError

    def inputs(self, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return random normal student and teacher; those that need a gradient require it."""
        generator = torch.Generator(device).manual_seed(seed)
        student, teacher = (
            torch.randn(self.shape, generator=generator, device=device).to(self.dtype)
            for _ in range(2)
        )
        if self.channels_last:
            student, teacher = (t.to(memory_format=torch.channels_last) for t in (student, teacher))
        return student.requires_grad_(), teacher.requires_grad_(self.both)

    def describe(self) -> dict[str, object]:
        """The settings, for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rows": list(self.rows),
            "dtype": dtype_name(self.dtype),
            "channels_last": self.channels_last,
            "both_gradients": self.both,
        }


@dataclass(frozen=True, kw_only=True)
class MapCase(Case):
    """``patch_cka`` of maps ``(B, C, H, W)``."""

    patch: int = 16
    group_by: str = "channel"
    relation: str = "rows"

    @property
    def rows(self) -> tuple[int, int, int]:
        b, c, h, w = self.shape
        n, area = -(-h // self.patch) * -(-w // self.patch), self.patch**2
        return {
            "channel": (c, n, b * area),
            "batch": (b, n, c * area),
            "position": (area, n, b * c),
        }[self.group_by]

    @property
    def columns(self) -> bool:
        return self.relation == "columns"

    @property
    def settings(self) -> dict[str, object]:
        """The keywords of :func:`pcka.patch_cka`."""
        return {"patch_size": self.patch, "group_by": self.group_by, "relation": self.relation}

    def quick(self) -> MapCase:
        # Not both sides are multiples of the patch size, so that the resize runs.
        return replace(self, shape=(2, 3, 20, 30), patch=min(self.patch, 8))

    def describe(self) -> dict[str, object]:
        return {**super().describe(), **self.settings}


@dataclass(frozen=True, kw_only=True)
class MatrixCase(Case):
    """``cka`` of matrices ``(N, D)``."""

    @property
    def rows(self) -> tuple[int, int, int]:
        n, d = self.shape
        return 1, n, d

    def quick(self) -> MatrixCase:
        return replace(self, shape=(8, 12))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The neck's maps of an 800 x 1333 image, padded to a multiple of 32: strides 4 to 32.
_LEVELS = {
    "p2": (2, 256, 200, 336),
    "p3": (2, 256, 100, 168),
    "p4": (2, 256, 50, 84),
    "p5": (2, 256, 25, 42),
}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(MapCase(name=name, shape=shape) for name, shape in _LEVELS.items()),
        MapCase(name="p3_batch", shape=_LEVELS["p3"], group_by="batch"),
        MapCase(name="p3_position", shape=_LEVELS["p3"], group_by="position"),
        MapCase(name="p3_columns", shape=_LEVELS["p3"], relation="columns"),
        MapCase(name="p3_patch8", shape=_LEVELS["p3"], patch=8),
        MapCase(name="p4_patch4", shape=_LEVELS["p4"], patch=4),
        MapCase(name="p2_bfloat16", shape=_LEVELS["p2"], dtype=torch.bfloat16),
        MapCase(name="p3_bfloat16", shape=_LEVELS["p3"], dtype=torch.bfloat16),
        MapCase(name="p3_channels_last", shape=_LEVELS["p3"], channels_last=True),
        MapCase(
            name="p3_bfloat16_channels_last",
            shape=_LEVELS["p3"],
            dtype=torch.bfloat16,
            channels_last=True,
        ),
        *(
            MatrixCase(name=name + suffix, shape=shape, both=both)
            for name, shape in (
                ("logits_64x100", (64, 100)),
                ("logits_256x1000", (256, 1000)),
                ("features_64x16384", (64, 16384)),
            )
            for suffix, both in (("", False), ("_both", True))
        ),
    )
}


# The same levels with the patch sizes of configs/detection/coco: P2 to P5 of two-stage detectors,
# P3 to P6 of one-stage ones. Rows come first, because all these configurations align them.
_PATCHES = {"p2": 16, "p3": 16, "p4": 16, "p5": 8, "p6": 4}
_SIZES = {"p2": (200, 336), "p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21)}
_ORDER = ("p3", "p2", "p4", "p5", "p6")

GPU_CASES: dict[str, MapCase] = {
    case.name: case
    for case in (
        MapCase(
            name=f"{level}_{relation}_{dtype_name(dtype)}_{batch}",
            shape=(batch, 256, *_SIZES[level]),
            patch=_PATCHES[level],
            relation=relation,
            dtype=dtype,
        )
        for relation, levels in (("rows", _ORDER), ("columns", ("p3", "p2", "p4", "p5")))
        for level in levels
        for batch in (2, 16)
        for dtype in (torch.bfloat16, torch.float32)
    )
}


def select(
    patterns: Sequence[str], *, quick: bool = False, cases: Mapping[str, Case] = CASES
) -> list[Case]:
    """Return the cases that match any of the shell patterns, in the order listed above.

    Raises:
        ValueError: a pattern matches no case.
    """
    for pattern in patterns:
        if not fnmatch.filter(cases, pattern):
            raise ValueError(f"--cases: nothing matches {pattern!r}; available: {', '.join(cases)}")
    chosen = [
        case
        for name, case in cases.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    return [case.quick() for case in chosen] if quick else chosen
