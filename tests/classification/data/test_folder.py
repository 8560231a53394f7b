from __future__ import annotations

import os
import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from PIL import Image

import classification.data.cifar  # noqa: F401  (before a test takes its name)
from classification.config import load_config
from classification.data import load_image_sets
from classification.data.digits import digits_source
from classification.data.folder import folder_source
from classification.data.source import _SOURCES

COLOURS = {"blue": (0, 0, 255), "amber": (255, 191, 0), "red": (255, 0, 0)}


@pytest.fixture
def root(tmp_path):
    """Two images of each class to train on and one to test on; class names tell the colour."""
    for split, images in (("train", 2), ("test", 1)):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                Image.new("RGB", (20, 12), colour).save(folder / f"{number}.png")
    return tmp_path


def config(root, **keys):
    values = {"DATA.NAME": "folder", "DATA.ROOT": root, "DATA.IMAGE_SIZE": 8, **keys}
    words = [str(word) for pair in values.items() for word in pair]
    return load_config(None, ["STUDENT.NAME", "resnet8", *words])


def test_classes_are_alphabetical_and_images_keep_their_label(root):
    train, test = load_image_sets(config(root))
    assert train.classes == test.classes == ("amber", "blue", "red")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(train.images, train.labels):
        assert image.shape == (3, 8, 8)
        assert tuple(image[:, 4, 4].tolist()) == COLOURS[train.classes[label]]


@pytest.mark.parametrize("portrait", [False, True])
def test_the_middle_of_the_resized_image_is_cut_out(root, portrait):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    image = Image.fromarray(pixels.transpose(1, 0, 2) if portrait else pixels)
    image.save(root / "test" / "red" / "0.png")
    _, test = load_image_sets(config(root))
    assert (test.images[2] == 255).all()


def test_val_serves_where_there_is_no_test(root):
    (root / "test").rename(root / "val")
    assert len(load_image_sets(config(root))[1]) == 3


def test_a_broken_image_names_its_file(root):
    broken = root / "train" / "blue" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"the image '.*blue.1\.png': .*; replace it, or"):
        load_image_sets(config(root))


def test_other_classes_in_the_test_folder_are_refused(root):
    (root / "test" / "red").rename(root / "test" / "green")
    with pytest.raises(ValueError, match=r"expected the same classes ") as refused:
        load_image_sets(config(root))
    file = next((root / "test" / "green").iterdir())
    assert f"only the evaluation images have 'green' (first {file})" in str(refused.value)
    assert "only the training images have 'red' (first " in str(refused.value)


def test_a_class_without_images_is_refused(root):
    (root / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"DATA.ROOT: .*train is not a class-per.* empty"):
        load_image_sets(config(root))


def test_class_folders_alone_are_trained_on_and_held_out_from(root):
    train, test = load_image_sets(config(root / "train", **{"DATA.HOLDOUT": 3}))
    assert (train.classes, train.labels.tolist()) == (("amber", "blue", "red"), [0, 1, 2])
    assert test.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"expected the folder .*test .*; DATA\.HOLDOUT N"):
        load_image_sets(config(root / "train"))


def test_a_folder_of_sets_is_no_set(root):
    (root.parent / "sets").mkdir()
    root.rename(root.parent / "sets" / "one")
    with pytest.raises(ValueError, match=r"expected the folder .*sets/train .* found none"):
        load_image_sets(config(root.parent / "sets", **{"DATA.HOLDOUT": 1}))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the folder .*test or .*val .* found none"):
        folder_source(CfgNode({"ROOT": str(tmp_path), "IMAGE_SIZE": 8}), "test")


def test_a_set_beyond_the_memory_limit_is_refused_before_an_image_is_read(root):
    for image in root.rglob("*.png"):
        image.write_bytes(b"")  # would fail if it were decoded
    with pytest.raises(ValueError, match=r"MEMORY_GB: 9 images of 8 .* DATA.STREAM True .*"):
        load_image_sets(config(root, **{"DATA.MEMORY_GB": 1e-7}))


def test_a_subset_reads_its_own_images_only(root):
    train, held_out = load_image_sets(config(root, **{"DATA.TRAIN_IMAGES": 3, "DATA.HOLDOUT": 3}))
    assert train.labels.tolist() == held_out.labels.tolist() == [0, 1, 2]


def test_a_streaming_set_has_no_memory_limit(root):
    train, _ = load_image_sets(config(root, **{"DATA.MEMORY_GB": 1e-7, "DATA.STREAM": True}))
    assert len(train) == 6


def test_resident_training_images_keep_all_that_the_middle_has(root):
    """DATA.RESIZE is of the evaluation: training crops by itself."""
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(
        root / "train" / "red" / "0.png"
    )
    plain, _ = load_image_sets(config(root))
    resized, _ = load_image_sets(config(root, **{"DATA.RESIZE": 16}))
    assert plain.fingerprint == resized.fingerprint


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_resize_of_what_are_no_files_is_refused(root, name, monkeypatch):
    monkeypatch.setitem(_SOURCES, "cifar10", digits_source)
    with pytest.raises(
        ValueError, match=rf"DATA.RESIZE: .* is '{name}', which has none; set it to 0"
    ):
        load_image_sets(config(root, **{"DATA.NAME": name, "DATA.RESIZE": 9}))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(root, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (root / "test" / "red" / "0.png").unlink()
    Image.fromarray(ramp).save(root / "test" / "red" / f"0.{suffix}")
    _, test = load_image_sets(config(root))
    expected = torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(test.images[2], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_no_stated_range_are_refused(root, dtype):
    (root / "test" / "red" / "0.png").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=dtype)).save(root / "test" / "red" / "0.tiff")
    with pytest.raises(ValueError, match=r"red.0\.tiff': its pixels have 32 bits"):
        load_image_sets(config(root))


@contextmanager
def hung_up(pipe):
    """Whoever opens the pipe finds its end, where he would wait for ever."""
    done = threading.Event()

    def hang_up():
        while not done.wait(0.05):
            with suppress(OSError):  # nobody has opened it
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    thread = threading.Thread(target=hang_up)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_pipe_among_the_images_is_named(root):
    pipe = root / "test" / "red" / "1.png"
    os.mkfifo(pipe)
    with hung_up(pipe), pytest.raises(ValueError, match=r"'.*red.1\.png': not a regular file"):
        load_image_sets(config(root))


@pytest.mark.parametrize("target", [".", "blue", "blue/deep"])
def test_a_link_to_a_folder_that_is_read_already_is_refused(root, target):
    (root / "train" / "blue" / "deep").mkdir()
    (root / "train" / "red" / "link").symlink_to(root / "train" / target)
    with pytest.raises(ValueError, match=r"DATA\.ROOT: .*train.* one folder through a link"):
        load_image_sets(config(root))


def test_a_link_to_a_folder_elsewhere_is_followed(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "red"
    (root / "train" / "red").rename(elsewhere)
    (root / "train" / "red").symlink_to(elsewhere)
    train, _ = load_image_sets(config(root))
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
