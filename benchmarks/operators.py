"""Speed of the operators on a CPU, compared with loops, eager PyTorch and the bare products.

Times forward and backward of the mean alignment with respect to the student. All variants of a case
take turns in one process; times are medians over the rounds, ratios medians of per-round ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.harness import compare, timing_table
from benchmarks.variants import timed_calls


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the files; return the records."""
    parser = report.parser("Time forward + backward of the operators and of their baselines.")
    report.add_cases(parser)
    report.add_rounds(parser, rounds=11, loop_rounds=3)
    options = parser.parse_args(arguments)
    cases = report.chosen_cases(parser, options)
    environment = report.start("cpu", options)
    records = []
    for case in cases:
        timings = compare(timed_calls(case, options.seed), **report.effort(options))
        records.append({"case": case.describe(), **timings})
    print(timing_table(records))
    report.write(options.output, "operators", environment, records)
    if options.output is not None:
        plot_times(options.output / "operators.png", records)
    return records


def plot_times(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Plot the time of each variant in multiples of the bare products."""
    times = [record["median_ms"] for record in records]
    report.plot_points(
        path,
        [record["case"]["name"] for record in records],
        {
            name: [ms[name] / ms["products"] if name in ms else None for ms in times]
            for name in ("loop", "split loop", "eager", "strong eager", "pcka")
            if any(name in ms for ms in times)
        },
        "time / time of the bare products",
    )


if __name__ == "__main__":
    main()
