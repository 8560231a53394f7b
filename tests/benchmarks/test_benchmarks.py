from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

import pcka
from benchmarks import accuracy, ceilings, device, layer_cka, memory, operators, operators_gpu
from benchmarks.baselines import Products
from benchmarks.cases import CASES, GPU_CASES, MapCase, MatrixCase, select
from benchmarks.harness import Spread, compare, interleave, markdown, ratio
from benchmarks.variants import alignments, step
from pcka.ops.functional import GROUPINGS, RELATIONS

needs_extension = pytest.mark.skipif(
    not pcka.build_info()["extension"], reason="the compiled operators are not loaded"
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]


@pytest.fixture(autouse=True)
def same_threads():
    """The scripts set them for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SMALL = [
    MapCase(
        name="map", shape=shape, patch=4, group_by=group_by, relation=relation, dtype=torch.float64
    )
    for shape in ((2, 3, 8, 12), (2, 3, 9, 14))
    for group_by in GROUPINGS
    for relation in RELATIONS
]
MATRICES = [
    MatrixCase(name="matrix", shape=shape, dtype=torch.float64, both=both)
    for shape in ((6, 20), (20, 6))
    for both in (False, True)
]


@pytest.mark.parametrize("case", [*SMALL, *MATRICES], ids=str)
def test_the_variants_equal_the_reference(case):
    inputs = case.inputs(seed=0)
    oracle = accuracy.reference_of(case)
    for name, alignment in alignments(case).items():
        torch.testing.assert_close(alignment(*inputs).reshape(-1), oracle(*inputs).reshape(-1))
        for found, expected in zip(step(alignment, *inputs), step(oracle, *inputs), strict=True):
            torch.testing.assert_close(found, expected, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    ("shape", "both", "products"),
    [((6, 20), False, 3), ((6, 20), True, 4), ((20, 6), False, 5), ((20, 6), True, 7)],
)
def test_bare_products_are_those_of_the_cheaper_form(shape, both, products):
    case = MatrixCase(name="matrix", shape=shape, both=both)
    bare = Products(case, torch.float32)
    bare()
    assert len(bare.plan) == products
    assert Products.flops_of(case) == products * 2 * 6 * 6 * 20
    z, _, gram = bare.plan[0]
    torch.testing.assert_close(gram, z @ z.mT)


def test_columns_are_aligned_by_grams_of_the_cheaper_side():
    case = MapCase(name="map", shape=(2, 3, 8, 12), patch=4, relation="columns")
    assert case.rows == (3, 6, 32)
    bare = Products(case, torch.float32)
    assert not bare.direct and bare.plan[0][2].shape == (3, 6, 6)


def test_cases_are_found_by_pattern():
    assert [case.name for case in select(["p2", "p3_b*"])] == [
        name for name in CASES if name == "p2" or name.startswith("p3_b")
    ]
    with pytest.raises(ValueError, match=r"nothing matches 'p9'; available: p2, p3"):
        select(["p9"])


def test_median_and_quartiles():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_ratios_are_taken_within_a_round_and_over_shared_rounds():
    # The medians' ratio would be 4 / 2; round by round it is 2, 4 and 1.
    assert ratio([2.0, 8.0, 4.0], [1.0, 2.0, 4.0, 9.0]).median == 2.0
    assert ratio([2.0, 8.0, 4.0], [1.0, 2.0, 4.0, 9.0]).rounds == 3


def test_variants_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timer = lambda call, times: (call(), 2.0)[1]  # noqa: E731 - slow, so each is called once
    seconds = interleave(calls, {"a": 1, "b": 3, "c": 3}, timer=timer)
    assert "".join(order) == "abc" + "abc" + "bc" + "cb"
    assert seconds == {"a": [2.0], "b": [2.0] * 3, "c": [2.0] * 3}


def test_loops_without_rounds_are_left_out():
    calls = dict.fromkeys(("loop", "split loop", "pcka", "products"), lambda: None)
    record = compare(calls, rounds=2, loop_rounds=0, sample_seconds=0.0)
    assert record["seconds"].keys() == record["median_ms"].keys() == {"pcka", "products"}
    assert record["ratios"].keys() == {"pcka/products"}


def test_rounds_are_counts(capsys):
    with pytest.raises(SystemExit):
        operators.main(["--rounds", "0"])
    assert "--rounds: must be 1 or more, got 0" in capsys.readouterr().err


def test_markdown():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


@needs_extension
def test_operators(tmp_path, capsys):
    names = ["p5", "p3_columns", "p3_bfloat16", "logits_64x100_both"]
    arguments = ["--quick", "--threads", "1", "--cases", *names, "--output", str(tmp_path)]
    operators.main(arguments)
    assert "| pcka/products |" in capsys.readouterr().out
    records = read(tmp_path, "operators")
    assert {record["case"]["name"] for record in records} == set(names)
    for record in records:
        assert {"eager", "pcka", "products"} <= record["seconds"].keys()
        assert record["median_ms"].keys() == record["seconds"].keys()
        assert record["ratios"]["pcka/products"].keys() == {"median", "low", "high", "rounds"}
    (half,) = (record for record in records if record["case"]["dtype"] == "bfloat16")
    assert {"pcka/products bfloat16", "pcka float32/pcka"} <= half["ratios"].keys()


@needs_extension
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    memory.main(["--quick", "--cases", "logits_64x100", "--output", str(tmp_path)])
    (record,) = read(tmp_path, "memory")
    assert record["student_bytes"] == 8 * 12 * 4
    assert record["peak_bytes"].keys() == {"eager", "pcka"}


@needs_extension
def test_accuracy(tmp_path):
    accuracy.main(["--quick", "--threads", "1", "--output", str(tmp_path)])
    records = read(tmp_path, "accuracy")
    assert len(records) == len(accuracy.CASES) * len(accuracy.DTYPES) * len(accuracy.INPUTS)
    for record in records:
        assert record["errors"]["pcka"].keys() == {"alignment", "gradient", "direction"}
        most = 3e-3 if record["case"]["dtype"] == "bfloat16" else 1e-3  # rows are rounded to it
        assert record["errors"]["pcka"]["alignment"] < most
        assert isinstance(record["flags"], list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_script_says_so_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        operators_gpu.main(["--quick"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err != ""


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_operators_of_a_gpu(tmp_path, device):
    given = ["--quick", "--device", device, "--threads", "1", "--output", str(tmp_path)]
    operators_gpu.main([*given, "--cases", "p3_rows_bfloat16_2", "p5_columns_float32_16"])
    content = json.loads((tmp_path / "operators_gpu.json").read_text())
    assert content["environment"]["ceilings"]["copy GB/s"] > 0
    rows, columns = content["records"]
    for record in (rows, columns):
        assert record["failures"] == {}
        assert {"pcka", "eager", "strong eager", "products"} <= record["median_ms"].keys()
        assert {"GB/s", "% of copy", "TFLOP/s", "% of product"} <= record["figures"].keys()
    assert "compiled eager" in rows["median_ms"]
    assert sum(kernel["count"] for kernel in rows["launches"]["pcka"]) > 3
    assert "launches" not in columns
    assert content["summary"][1].startswith("p3_rows_bfloat16_2: pcka ")
    if device == "cuda":
        assert {"pcka graph", "eager graph", "compiled eager graph"} <= rows["median_ms"].keys()


def test_a_variant_that_fails_is_named_and_the_rest_goes_on(monkeypatch):
    def broken(student, teacher):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    real = operators_gpu.alignments
    monkeypatch.setattr(operators_gpu, "alignments", lambda case: {**real(case), "eager": broken})
    options = argparse.Namespace(device="cpu", seed=0, quick=True, rounds=1)
    peaks = {"copy GB/s": 1.0, "float32 TFLOP/s": 1.0}
    case = MapCase(name="map", shape=(2, 3, 8, 12), patch=4)
    found = operators_gpu.record(case, options, peaks)
    assert found["failures"] == {"eager": "OutOfMemoryError: CUDA out of memory."}
    assert found["median_ms"].keys() == {"pcka", "strong eager", "products"}


def test_no_case_begins_after_its_time(tmp_path, capsys):
    given = ["--quick", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    assert operators_gpu.main([*given, "--cases", "p4*", "--seconds", "0"]) == []
    assert "skipped p4_rows_bfloat16_2, p4_rows_float32_2" in capsys.readouterr().out


def test_the_cases_of_a_gpu_are_the_levels_as_the_configurations_cut_them():
    assert {case.patch for name, case in GPU_CASES.items() if name.startswith("p5")} == {8}
    groups, rows, columns = GPU_CASES["p6_rows_float32_16"].rows
    assert (groups, rows, columns) == (256, 24, 16 * 16)
    assert {name.split("_")[0] for name in GPU_CASES} == {"p2", "p3", "p4", "p5", "p6"}


@pytest.mark.parametrize("device", DEVICES)
def test_ceilings_are_what_the_device_can_do(device):
    found = ceilings.measure(device, quick=True)
    assert found.keys() == {
        "copy GB/s", "bfloat16 TFLOP/s", "TF32 TFLOP/s", "float32 TFLOP/s",
    }  # fmt: skip
    assert all(value > 0 for value in found.values())
    assert torch.get_float32_matmul_precision() == "highest"


def test_launches_are_counted_by_call():
    x = torch.randn(4, 4)
    (found,) = (
        k for k in device.launches(lambda: x.mm(x).mm(x), "cpu") if k["kernel"] == "aten::mm"
    )
    assert found["count"] == 2 and found["microseconds"] > 0


def read(folder, name):
    """The records of a script, written beside a plot and what they were made with."""
    assert (folder / f"{name}.png").stat().st_size > 0
    content = json.loads((folder / f"{name}.json").read_text())
    known = {"torch", "build_info", "git", "command_line", "seed", "threads", "processor"}
    assert known <= content["environment"].keys()
    return content["records"]


def test_cka_of_all_layers_is_compared_with_itself_in_float64(capsys):
    words = "--models resnet8 resnet8 --batches 2 --batch-size 8 --rounds 1 --threads 1"
    figures = layer_cka.main(words.split())["pcka"]
    assert figures["error"] < 1e-5 and figures["error_in_float64"] == 0
    assert "resnet8 (10 layers) x resnet8 (10 layers), 2 batches of 8" in capsys.readouterr().out
