"""Image sets, their splits, and the batches of an epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from classification.config import load_config
from classification.data import load_image_sets, training_batches
from classification.data.augment import crop_and_flip
from classification.data.image_set import ImageSet, balanced_order


def digits_config(*words):
    return load_config(None, ["STUDENT.NAME", "resnet8", "DATA.NAME", "digits", *words])


def folder_config(root, *words):
    return load_config(
        None, ["STUDENT.NAME", "resnet8", "DATA.NAME", "folder", "DATA.ROOT", str(root), *words]
    )


def make_folder(root, classes=("cat", "dog"), splits=("train", "test"), size=(40, 20)):
    for split in splits:
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                color = (80 * index, 10 * number, 0)
                Image.new("RGB", size, color).save(root / split / name / f"{number}.png")
    return root


def test_crop_and_flip_is_what_it_says():
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    offsets = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [3, 0], [0, 4]])
    flipped = torch.tensor([False, True, False, True, True, False])
    result = crop_and_flip(images, offsets, flipped, 2)
    assert torch.equal(result[2], images[2])  # the middle window is the image itself
    for image, (row, column), flip, got in zip(images, offsets.tolist(), flipped, result):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
        window = padded[:, row : row + 8, column : column + 8]
        assert np.array_equal(got.numpy(), window[:, :, ::-1] if flip else window)


def test_digits_are_split_once_for_ever():
    train, test = load_image_sets(digits_config("SEED", "0"))
    again, _ = load_image_sets(digits_config("SEED", "7", "DATA.SPLIT_SEED", "5"))
    assert (len(train), len(test)) == (900, 897)
    assert train.images.shape[1:] == (3, 32, 32) and train.images.dtype == torch.uint8
    assert train.fingerprint == again.fingerprint
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert torch.bincount(train.labels).min() >= 85


def test_holdout_and_subset_come_from_the_training_images_alone():
    train, _ = load_image_sets(digits_config())
    kept, held_out = load_image_sets(
        digits_config("DATA.HOLDOUT", "200", "DATA.TRAIN_IMAGES", "100")
    )
    assert (len(kept), len(held_out)) == (100, 200)
    everything = {image.numpy().tobytes() for image in train.images}
    first, second = ({i.numpy().tobytes() for i in s.images} for s in (kept, held_out))
    assert first < everything and second < everything and not first & second
    assert torch.bincount(kept.labels).tolist() == [10] * 10
    with pytest.raises(ValueError, match=r"900 \+ 100 images are asked for.*has 900"):
        load_image_sets(digits_config("DATA.HOLDOUT", "900", "DATA.TRAIN_IMAGES", "100"))


def test_balanced_order_is_balanced_at_every_length():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    order = balanced_order(labels, seed=3)
    assert sorted(order) == list(range(100))
    for length in (3, 10, 31, 60):
        counts = np.bincount(labels[order[:length]], minlength=3)
        assert counts.max() - counts.min() <= 1


def small_set(n=20):
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4)
    return ImageSet(pixels.contiguous(), torch.arange(n) % 2, ("a", "b"))


def epoch_of(cfg, epoch):
    return torch.cat(
        [images[:, 0, 1, 1] * 255 for images, _ in training_batches(small_set(), cfg, epoch)]
    )


def test_order_depends_on_seed_and_epoch_alone():
    plain = ["SOLVER.BATCH_SIZE", "5", "DATA.CROP_PADDING", "0", "DATA.FLIP", "false"]
    cfg, other = digits_config(*plain), digits_config(*plain, "SEED", "1")
    first = epoch_of(cfg, 0)
    assert sorted(first.round().int().tolist()) == list(range(20))
    torch.rand(3)  # whatever else draws random numbers
    assert torch.equal(first, epoch_of(cfg, 0))
    assert not torch.equal(first, epoch_of(cfg, 1))
    assert not torch.equal(first, epoch_of(other, 0))
    cropped = digits_config(*plain[:2])
    labels = [
        torch.cat([y for _, y in training_batches(small_set(), c, 0)]) for c in (cfg, cropped)
    ]
    assert torch.equal(*labels)  # the augmentation does not change the order


def test_folder_images_of_any_size(tmp_path):
    train, test = load_image_sets(folder_config(make_folder(tmp_path), "DATA.IMAGE_SIZE", "16"))
    assert train.images.shape == (6, 3, 16, 16) and len(test) == 6
    assert train.classes == ("cat", "dog")
    assert train.images[:, 0].flatten(1).float().mean(1).tolist() == [0, 0, 0, 80, 80, 80]


def test_a_broken_image_names_its_file(tmp_path):
    make_folder(tmp_path)
    broken = tmp_path / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot decode the image .*train/dog/1\.png"):
        load_image_sets(folder_config(tmp_path))


def test_folders_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DATA\.ROOT: expected the folder .*train"):
        load_image_sets(folder_config(tmp_path))
    make_folder(tmp_path, splits=("train",))
    make_folder(tmp_path, classes=("cat", "cow"), splits=("val",))
    with pytest.raises(ValueError, match="in one of them only: cow, dog"):
        load_image_sets(folder_config(tmp_path))


def test_too_large_or_of_another_class_count_is_refused_before_decoding(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"DATA\.MEMORY_GB: 12 images of 32 pixels"):
        load_image_sets(folder_config(tmp_path, "DATA.MEMORY_GB", "1e-6"))
    with pytest.raises(ValueError, match="5 classes are configured, the data has 2"):
        load_image_sets(folder_config(tmp_path, "DATA.NUM_CLASSES", "5"))


def test_missing_cifar_says_how_to_get_it(tmp_path):
    words = ["STUDENT.NAME", "resnet8", "DATA.NAME", "cifar10", "DATA.ROOT", str(tmp_path)]
    with pytest.raises(ValueError, match=r"no complete cifar10.*DATA\.DOWNLOAD True"):
        load_image_sets(load_config(None, words))
