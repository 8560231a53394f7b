from __future__ import annotations

import json

import pytest
import torch

import pcka
from benchmarks import classification_data


@pytest.fixture(autouse=True)
def same_threads():
    """The script sets them for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not pcka.build_info()["extension"], reason="the operators are not loaded")
def test_classification_data(tmp_path, capsys):
    arguments = ["--quick", "--threads", "1", "--workers", "0", "1", "--output", str(tmp_path)]
    records = classification_data.main(arguments)
    assert "| streaming, 1 workers |" in capsys.readouterr().out
    content = json.loads((tmp_path / "classification_data.json").read_text())
    assert content["records"] == records
    assert content["environment"].keys() >= {"torch", "git", "command_line", "processor", "cores"}
    assert (tmp_path / "classification_data.png").stat().st_size > 0
    assert [record["case"]["workers"] for record in records] == [0, 1, None]
    for record in records:
        assert record["case"]["images"] in (8, 16)
        rate = record["case"]["images"] / record["seconds"][0]
        assert record["images_per_second"]["median"] == pytest.approx(rate)
        assert record["until_first_batch"]["median"] > 0


def test_the_images_that_are_made_up_are_as_large_as_photographs(tmp_path):
    classification_data.make_images(tmp_path, 2, seed=0)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.jpg")]
    assert len(sizes) == 4
    assert 80_000 < sum(sizes) / len(sizes) < 140_000
