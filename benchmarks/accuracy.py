"""Accuracy of the operators: errors against float64, compared with those of eager PyTorch.

The reference is ``pcka.ops.reference`` in float64 on the same rounded inputs. Eager PyTorch runs
entirely in the dtype of the input, and again on inputs widened to float32. Errors are root mean
squares over the seeds:

- alignment: ``|a - a64| / |a64|`` over the groups;
- gradient: ``|g - g64| / |g64|``, of the mean alignment with respect to the student;
- direction: ``1 - cosine`` of the two gradients, which grows with the square of their distance.

A ratio above 2 to either eager variant is flagged; if eager has no finite figure (float16
overflows), there is none. In float16 the loss is scaled against underflow, as in mixed-precision
training, and the scale is divided out in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.cases import Case, MapCase, MatrixCase, dtype_name
from benchmarks.harness import markdown
from benchmarks.variants import Alignment, alignments
from pcka.ops import reference

_MAP = (2, 8, 50, 84)
CASES: tuple[Case, ...] = (
    MapCase(name="channel", shape=_MAP),
    MapCase(name="channel, 25 x 42", shape=(2, 8, 25, 42)),
    MapCase(name="channel, patch 8", shape=_MAP, patch=8),
    MapCase(name="channel, patch 4", shape=_MAP, patch=4),
    MapCase(name="batch", shape=_MAP, group_by="batch"),
    MapCase(name="position", shape=_MAP, group_by="position"),
    MapCase(name="columns", shape=_MAP, relation="columns"),
    MapCase(name="columns, patch 4", shape=_MAP, relation="columns", patch=4),
    MatrixCase(name="cka 64 x 100", shape=(64, 100)),
    MatrixCase(name="cka 100 x 64", shape=(100, 64)),
    MatrixCase(name="cka 64 x 4096", shape=(64, 4096)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Student and teacher of unit variance, from two independent normal tensors.
INPUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "random": lambda a, b: (a, b),
    "mean 100": lambda a, b: (a + 100, b + 100),
    "mean 1000": lambda a, b: (a + 1000, b + 1000),
    "teacher + 1e-2": lambda a, b: (a, a + 1e-2 * b),
    "teacher + 1e-3": lambda a, b: (a, a + 1e-3 * b),
}
QUANTITIES = ("alignment", "gradient", "direction")
LIMIT = 2.0
_LOSS_SCALE = {torch.float16: 4096.0}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the tables and write the files; return the records."""
    parser = report.parser("Errors of the operators and of eager PyTorch against float64.")
    report.add_device(parser, default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="number, starting at --seed")
    options = parser.parse_args(arguments)
    environment = report.start(options.device, options)
    cases = [case.quick() for case in CASES] if options.quick else CASES
    seeds = range(options.seed, options.seed + (1 if options.quick else options.seeds))
    records = [
        record(case, dtype, inputs, seeds, options.device)
        for dtype in DTYPES
        for case in cases
        for inputs in INPUTS
    ]
    print(accuracy_table(records))
    print(summary(records))
    lines = [line for line in summary(records).splitlines()[2:] if line]
    report.write(options.output, "accuracy", environment, records, lines)
    if options.output is not None:
        _plot(options.output / "accuracy.png", records)
    return records


def record(
    case: Case, dtype: torch.dtype, inputs: str, seeds: Sequence[int], device: str = "cpu"
) -> dict[str, Any]:
    """Return ``errors``: variant -> quantity -> error, ``ratios``: the operator's to eager's."""
    each = [_errors(case, dtype, inputs, seed, device) for seed in seeds]
    errors = {
        variant: {
            quantity: _root_mean_square([of_seed[variant][quantity] for of_seed in each])
            for quantity in QUANTITIES
        }
        for variant in each[0]
    }
    own = errors["pcka"]
    ratios = {
        variant: {name: _ratio(own[name], errors[variant][name]) for name in QUANTITIES}
        for variant in errors
        if variant != "pcka"
    }
    flags = [
        f"{quantity} of {variant}"
        for variant, of_variant in ratios.items()
        for quantity, value in of_variant.items()
        if value is not None and value > LIMIT
    ]
    flags += [f"{quantity} not finite" for quantity in QUANTITIES if not isfinite(own[quantity])]
    return {
        "case": {**case.describe(), "dtype": dtype_name(dtype)},
        "inputs": inputs,
        "errors": errors,
        "ratios": ratios,
        "flags": flags,
    }


def _errors(
    case: Case, dtype: torch.dtype, inputs: str, seed: int, device: str
) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    pair = INPUTS[inputs](*(torch.randn(case.shape, generator=generator) for _ in range(2)))
    student, teacher = (t.to(device, dtype) for t in pair)
    functions, scale = alignments(case), _LOSS_SCALE.get(dtype, 1.0)
    exact = _evaluate(reference_of(case), student, teacher, scale, torch.float64)
    results = {
        name: _evaluate(functions[name], student, teacher, scale) for name in ("pcka", "eager")
    }
    if dtype != torch.float32:
        results["eager float32"] = _evaluate(
            functions["eager"], student, teacher, scale, torch.float32
        )
    return {name: _compare(result, exact) for name, result in results.items()}


def reference_of(case: Case) -> Alignment:
    """Return the function of ``pcka.ops.reference`` for the case."""
    if not isinstance(case, MapCase):
        return reference.cka
    patch, group_by, relation = (case.patch, case.patch), case.group_by, case.relation
    return lambda student, teacher: reference.patch_cka(
        student, teacher, patch_size=patch, group_by=group_by, relation=relation, center=True
    )


def _evaluate(
    alignment: Alignment,
    student: Tensor,
    teacher: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return alignments, and their mean's gradient with respect to the student, in float64.

    ``dtype`` widens the inputs first; the gradient is still rounded to the student's own dtype,
    as in the cast's backward, except for float64.
    """
    wide = [t if dtype is None else t.to(dtype) for t in (student, teacher)]
    leaf = wide[0].detach().requires_grad_()
    aligned = alignment(leaf, wide[1])
    (gradient,) = torch.autograd.grad(
        aligned.to(reference.accumulation_dtype(aligned.dtype)).mean() * scale, leaf
    )
    if dtype != torch.float64:
        gradient = gradient.to(student.dtype)
    return aligned.detach().double(), gradient.double() / scale


def _compare(result: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    (alignment, gradient), (alignment64, gradient64) = result, exact
    return {
        "alignment": _relative(alignment, alignment64),
        "gradient": _relative(gradient, gradient64),
        "direction": _angle(gradient, gradient64),
    }


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def _angle(value: Tensor, exact: Tensor) -> float:
    """Return ``1 - cosine``, without cancellation; 1 if the value has underflowed to zero."""
    if not value.any():
        return 1.0
    return 0.5 * float((value / value.norm() - exact / exact.norm()).square().sum())


def _root_mean_square(values: Sequence[float]) -> float:
    return sqrt(sum(value**2 for value in values) / len(values))


def _ratio(own: float, other: float) -> float | None:
    """Return the ratio; None if the other error is zero or not finite."""
    return own / other if isfinite(other) and other > 0 else None


def accuracy_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the operator's errors and their ratios to eager's in the input's dtype / float32."""
    rows = []
    for entry in records:
        row = [entry["case"]["name"], entry["case"]["dtype"], entry["inputs"]]
        for quantity in QUANTITIES:
            ratios = [entry["ratios"][name][quantity] for name in entry["ratios"]]
            row.append(f"{entry['errors']['pcka'][quantity]:.1e}")
            row.append(" / ".join("-" if r is None else f"{r:.2g}" for r in ratios))
        rows.append([*row, "; ".join(entry["flags"])])
    header = [text for quantity in QUANTITIES for text in (quantity, "/eager, /float32")]
    return markdown(["case", "dtype", "inputs", *header, f"above {LIMIT:g}"], rows)


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the greatest ratio per dtype and quantity, and the number of flagged rows."""
    rows = []
    for dtype in map(dtype_name, DTYPES):
        for variant in ("eager", "eager float32"):
            of_dtype = [r for r in records if r["case"]["dtype"] == dtype]
            found = [r["ratios"][variant] for r in of_dtype if variant in r["ratios"]]
            if found:
                worst = [max((r[name] or 0.0 for r in found), default=0.0) for name in QUANTITIES]
                rows.append([f"{dtype}, pcka/{variant}", *(f"{value:.2g}" for value in worst)])
    flagged = sum(bool(entry["flags"]) for entry in records)
    table = markdown(["greatest ratio", *QUANTITIES], rows)
    return f"{table}\n{flagged} of {len(records)} rows have a ratio above {LIMIT:g}.\n"


def _plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Plot the greatest ratio of the gradient's error over the kinds of input, for each case."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for entry in records:
        for variant, ratios in entry["ratios"].items():
            of_cases = worst.setdefault((entry["case"]["dtype"], variant), {})
            name = entry["case"]["name"]
            of_cases[name] = max(of_cases.get(name, 0.0), ratios["gradient"] or 0.0)
    labels = list(dict.fromkeys(entry["case"]["name"] for entry in records))
    series = {
        f"{dtype} / {variant}": [of_cases[label] for label in labels]
        for (dtype, variant), of_cases in worst.items()
    }
    report.plot_points(path, labels, series, "greatest ratio of the gradient's error")


if __name__ == "__main__":
    main()
