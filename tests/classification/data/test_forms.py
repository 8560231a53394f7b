"""What holds for the same images in every form: the batches are those of the folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from classification.data import load_evaluation_set, load_image_sets
from classification.run import run_experiment

FORMS = ("csv", "parquet", "shards", "saved")
forms = pytest.mark.parametrize("form", FORMS)


def epoch(data, cfg):
    return [torch.stack(parts) for parts in zip(*data.training_batches(cfg, 1))]


@forms
@pytest.mark.parametrize("stream", [False, True])
def test_labels_order_and_pixels_are_those_of_the_folder(written, streaming_config, form, stream):
    cfg = written(form, **{"DATA.STREAM": stream})
    ours, theirs = (
        load_image_sets(cfg),
        load_image_sets(streaming_config(**{"DATA.STREAM": stream})),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.classes == other.classes == ("amber", "blue", "red")
        assert torch.equal(one.labels, other.labels)
        pairs = zip(next(one.evaluation_batches()), next(other.evaluation_batches()))
        assert all(torch.equal(a, b) for a, b in pairs)
        if not stream:  # a resident set is its pixels, whatever they came from
            assert one.fingerprint == other.fingerprint
    for a, b in zip(epoch(ours[0], cfg), epoch(theirs[0], cfg), strict=True):
        assert torch.equal(a, b)


@forms
def test_workers_read_the_same_pixels(written, form):
    cfg = written(form, **{"DATA.WORKERS": 2})
    alone, _ = load_image_sets(written(form))
    for a, b in zip(epoch(load_image_sets(cfg)[0], cfg), epoch(alone, cfg), strict=True):
        assert torch.equal(a, b)


@forms
def test_what_workers_are_sent_where_they_are_not_forked_is_the_same(written, form):
    train, _ = load_image_sets(written(form))
    sent = pickle.loads(pickle.dumps(train.files))
    assert sent.digest == train.files.digest
    assert sent.open(7).tobytes() == train.files.open(7).tobytes()


@forms
def test_held_out_images_and_subsets_are_those_of_the_folder(written, streaming_config, form):
    keys = {"DATA.HOLDOUT": 9, "DATA.TRAIN_IMAGES": 15, "DATA.STREAM": False}
    ours, theirs = load_image_sets(written(form, **keys)), load_image_sets(streaming_config(**keys))
    assert [one.fingerprint for one in ours] == [other.fingerprint for other in theirs]
    assert load_evaluation_set(written(form, **keys)).fingerprint == ours[1].fingerprint


@forms
def test_the_fingerprint_of_a_stream_knows_its_images_and_not_their_place(
    written, streaming_config, noisy_root, form
):
    cfg = written(form)
    train, _ = load_image_sets(cfg)
    assert train.fingerprint != train.subset(torch.arange(35)).fingerprint
    elsewhere = noisy_root / "elsewhere"
    elsewhere.mkdir()
    for entry in set(noisy_root.iterdir()) - {elsewhere}:
        entry.rename(elsewhere / entry.name)
    root = elsewhere / Path(cfg.DATA.ROOT).relative_to(noisy_root)
    moved, _ = load_image_sets(streaming_config(**{"DATA.NAME": cfg.DATA.NAME, "DATA.ROOT": root}))
    assert moved.fingerprint == train.fingerprint


@forms
@pytest.mark.parametrize("stream", [False, True])
def test_a_training_goes_on_bit_for_bit(
    written, form, stream, tmp_path, assert_same_run, without_plots
):
    def config(name, epochs):
        keys = {"OUTPUT_DIR": tmp_path / name, "SOLVER.EPOCHS": epochs, "DEVICE": "cpu"}
        return written(form, **keys, **{"DATA.STREAM": stream})

    run_experiment(config("whole", 2))
    run_experiment(config("parts", 1))
    run_experiment(config("parts", 2), resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@forms
def test_a_streaming_training_that_is_killed_goes_on_bit_for_bit(
    written, form, start, tmp_path, assert_same_run
):
    cfg = written(form, **{"DATA.WORKERS": 1, "DEVICE": "cpu", "SOLVER.EPOCHS": 6})

    def train(name: str):
        folder = tmp_path / name
        (tmp_path / "cfg.yaml").write_text(cfg.dump())
        words = ["--config-file", tmp_path / "cfg.yaml", "--resume", "OUTPUT_DIR", folder]
        return start("classification/train.py", *words)

    train("killed").kill_when((tmp_path / "killed" / "checkpoint.pth").exists)
    train("killed").succeed()
    train("whole").succeed()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert '"epoch": 6' in (tmp_path / "killed" / "metrics.jsonl").read_text()
