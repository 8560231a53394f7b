from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from classification.data import load_evaluation_set, load_image_sets


def epoch(data, cfg, number, **share):
    """Images, labels and indices of one epoch, each (steps, b, ...)."""
    return [torch.stack(parts) for parts in zip(*data.training_batches(cfg, number, **share))]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def train(streaming_config):
    return load_image_sets(streaming_config())[0]


def test_an_epoch_holds_distinct_augmented_images_with_their_labels(train, streaming_config):
    images, labels, indices = epoch(train, streaming_config(), 0)
    assert images.shape == (4, 8, 3, 16, 16)  # the 4 images left over are left out
    assert images.dtype == torch.float32
    assert images.min() >= 0 and 0.9 < images.max() <= 1
    assert len(set(indices.flatten().tolist())) == 32
    assert torch.equal(labels, train.labels[indices])
    assert len({image.numpy().tobytes() for image in images.flatten(0, 1)}) == 32


@pytest.mark.parametrize("workers", [1, 2])
def test_the_pixels_do_not_depend_on_the_number_of_workers(train, streaming_config, workers):
    cfg = streaming_config(**{"DATA.WORKERS": workers})
    others = load_image_sets(cfg)[0]
    assert_equal(epoch(train, cfg, 1), epoch(others, cfg, 1))


def test_order_and_augmentation_follow_seed_and_epoch_alone(train, streaming_config):
    cfg = streaming_config()
    first = epoch(train, cfg, 0)
    torch.manual_seed(99)
    epoch(train, cfg, 1)  # a resumed run has not seen this one
    assert_equal(first, epoch(train, cfg, 0))
    for other in (epoch(train, cfg, 1), epoch(train, streaming_config(SEED=1), 0)):
        assert not torch.equal(first[2], other[2])


def test_an_image_is_augmented_anew_in_every_epoch(train, streaming_config):
    cfg = streaming_config(**{"SOLVER.BATCH_SIZE": 36})
    (one, _, order), (other, _, other_order) = epoch(train, cfg, 0), epoch(train, cfg, 1)
    same = (one[0, order[0].argsort()] == other[0, other_order[0].argsort()]).flatten(1).all(1)
    assert not same.any()


def test_an_images_augmentation_follows_its_position_in_the_set_and_no_other_image(
    train, streaming_config
):
    images, _, order = epoch(train, streaming_config(**{"SOLVER.BATCH_SIZE": 36}), 0)
    few, _, few_order = epoch(
        train.subset(torch.arange(5)), streaming_config(**{"SOLVER.BATCH_SIZE": 5}), 0
    )
    assert torch.equal(images[0, order[0].argsort()[:5]], few[0, few_order[0].argsort()])


def test_training_pixels_are_those_of_a_random_resized_crop_seeded_by_image(
    train, streaming_config, noisy_root
):
    images, _, indices = epoch(train, streaming_config(SEED=3), 2)
    position = int(indices[0, 0])
    (seed,) = np.random.SeedSequence((3, 2, 2, position)).generate_state(1, np.uint64)
    torch.manual_seed(int(seed))
    transform = transforms.Compose(
        [transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip()]
    )
    file = sorted((noisy_root / "train").rglob("*.png"))[position]
    pixels = np.asarray(transform(Image.open(file))).transpose(2, 0, 1)
    assert torch.equal(images[0, 0], torch.from_numpy(pixels.copy()) / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(train, streaming_config, workers):
    cfg = streaming_config(**{"DATA.WORKERS": workers})
    train, held_out = load_image_sets(cfg)
    before = torch.get_rng_state()
    for batches in (train.training_batches(cfg, 0), held_out.evaluation_batches()):
        for _ in batches:
            assert torch.equal(torch.get_rng_state(), before)


def test_flips_are_left_out_where_they_are_not_wanted(train, streaming_config, noisy_root):
    for file in (noisy_root / "train").rglob("*.png"):
        ramp = np.arange(0, 240, 6, dtype=np.uint8)[None, :, None]
        Image.fromarray(np.broadcast_to(ramp, (30, 40, 3)).copy()).save(file)
    keys = {"SOLVER.BATCH_SIZE": 36}
    for flip, least, most in ((True, 8, 28), (False, 0, 0)):
        images, *_ = epoch(train, streaming_config(**keys, **{"DATA.FLIP": flip}), 0)
        mirrored = (images[0, ..., 0] > images[0, ..., -1]).flatten(1).all(1)
        assert least <= mirrored.sum() <= most


@pytest.mark.parametrize(("resize", "side"), [(0, 16), (24, 24)])
def test_evaluation_resizes_the_shorter_side_and_cuts_out_the_centre(
    streaming_config, noisy_root, resize, side
):
    data = load_evaluation_set(streaming_config(**{"DATA.RESIZE": resize}))
    images, labels, indices = map(torch.cat, zip(*data.evaluation_batches(4)))
    assert indices.tolist() == list(range(9))
    assert torch.equal(labels, data.labels)
    for image, file in zip(images, sorted((noisy_root / "val").rglob("*.png"))):
        whole = Image.open(file).resize((side * 40 // 30, side), Image.Resampling.BILINEAR)
        pixels = np.asarray(whole).astype(np.float32).transpose(2, 0, 1) / 255
        top, left = ((length - 16) // 2 for length in pixels.shape[1:])
        assert (image.numpy() == pixels[:, top : top + 16, left : left + 16]).all()


@pytest.mark.parametrize("resize", [0, 24])
def test_a_file_is_evaluated_alike_resident_and_streamed(streaming_config, resize):
    keys = {"DATA.RESIZE": resize}
    streamed = load_evaluation_set(streaming_config(**keys))
    keys["DATA.STREAM"] = False
    resident = load_evaluation_set(streaming_config(**keys))
    assert_equal(next(streamed.evaluation_batches()), next(resident.evaluation_batches()))
    assert_equal(
        next(load_image_sets(streaming_config(**keys))[1].evaluation_batches()),
        next(resident.evaluation_batches()),
    )


def test_each_process_takes_its_part_of_every_batch(train, streaming_config):
    cfg = streaming_config()
    parts = [epoch(train, cfg, 0, rank=rank, world_size=4) for rank in range(4)]
    assert parts[0][0].shape[:2] == (4, 2)
    assert_equal(epoch(train, cfg, 0), [torch.cat(of_all, dim=1) for of_all in zip(*parts)])


def test_held_out_images_are_not_trained_on(streaming_config, noisy_root):
    cfg = streaming_config(**{"DATA.HOLDOUT": 9, "DATA.TRAIN_IMAGES": 15})
    train, held_out = load_image_sets(cfg)
    assert train.labels.bincount().tolist() == [5] * 3
    assert held_out.labels.bincount().tolist() == [3] * 3
    paths = [{data.files.path(i) for i in range(len(data))} for data in (train, held_out)]
    assert not paths[0] & paths[1]
    assert not any("val" in os.path.relpath(path, noisy_root) for path in paths[1])
    resident = load_image_sets(
        streaming_config(**{"DATA.HOLDOUT": 9, "DATA.TRAIN_IMAGES": 15, "DATA.STREAM": False})
    )
    assert torch.equal(train.labels, resident[0].labels)


# slow: torch waits five seconds for a worker that has failed
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_broken_image_names_its_file(streaming_config, noisy_root, workers):
    broken = noisy_root / "train" / "blue" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    cfg = streaming_config(**{"DATA.WORKERS": workers, "SOLVER.BATCH_SIZE": 36})
    train, _ = load_image_sets(cfg)
    with pytest.raises(ValueError, match=r"^cannot decode the image '.*blue.03\.png'") as refused:
        list(train.training_batches(cfg, 0))
    assert "\n" not in str(refused.value)  # no traceback of the worker's


def test_the_fingerprint_sees_names_sizes_labels_and_the_side_and_reads_nothing(
    train, streaming_config, noisy_root
):
    fingerprints = [train.fingerprint, train.subset(torch.arange(35)).fingerprint]
    fingerprints.append(load_image_sets(streaming_config(**{"DATA.IMAGE_SIZE": 8}))[0].fingerprint)
    file = noisy_root / "train" / "amber" / "00.png"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    assert load_image_sets(streaming_config())[0].fingerprint == train.fingerprint
    file.write_bytes(content[:-1])
    fingerprints.append(load_image_sets(streaming_config())[0].fingerprint)
    file.rename(file.with_name("000.png"))
    fingerprints.append(load_image_sets(streaming_config())[0].fingerprint)
    file.with_name("000.png").rename(noisy_root / "train" / "blue" / "000.png")
    fingerprints.append(load_image_sets(streaming_config())[0].fingerprint)
    assert len(set(fingerprints)) == 6


def test_the_fingerprint_does_not_depend_on_where_the_files_lie(
    train, streaming_config, noisy_root
):
    before = train.fingerprint
    (noisy_root / "elsewhere").mkdir()
    for split in ("train", "val"):
        (noisy_root / split).rename(noisy_root / "elsewhere" / split)
    moved = streaming_config(**{"DATA.ROOT": noisy_root / "elsewhere"})
    assert load_image_sets(moved)[0].fingerprint == before


def test_batches_go_to_the_device_of_the_set(train, streaming_config):
    there = train.to(torch.device("meta"))
    assert there.device.type == "meta" and len(there) == len(train)
    batch = next(there.training_batches(streaming_config(), 0))
    assert {part.device.type for part in batch} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_same_batches(streaming_config, workers):
    cfg = streaming_config(**{"DATA.WORKERS": workers})
    train, _ = load_image_sets(cfg)
    there = epoch(train.to(torch.device("cuda")), cfg, 0)
    assert_equal(epoch(train, cfg, 0), [part.cpu() for part in there])


def test_what_has_no_files_does_not_stream(streaming_config):
    with pytest.raises(ValueError, match=r"DATA.STREAM: is for image files, .* is 'digits'"):
        load_image_sets(streaming_config(**{"DATA.NAME": "digits"}))


def test_a_centre_larger_than_the_resized_image_is_refused(streaming_config):
    with pytest.raises(ValueError, match=r"DATA.RESIZE: expected at least .*\(16\).* got 15"):
        load_image_sets(streaming_config(**{"DATA.RESIZE": 15}))
