from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from classification.data import load_image_sets
from pcka.engine.config import ConfigError


@pytest.fixture
def shard(written, noisy_root):
    """``shard(members, **keys)``: a training shard of these names and contents beside the others.

    A content of None is an image.
    """

    def write(members: list[tuple[str, bytes | None]], **keys: object):
        cfg = written("shards", **keys)
        image = (noisy_root / "train" / "red" / "00.png").read_bytes()
        with tarfile.open(noisy_root / "train-zzz.tar", "w") as archive:
            for name, content in members:
                content = image if content is None else content
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return cfg

    return write


def test_labels_stand_in_cls_or_json_and_other_members_are_passed_over(shard):
    members = [
        ("._a.png", b"of a Mac"),
        ("README", b"no sample"),
        ("deep.er/a.JPG", None),
        ("deep.er/a.txt", b"a caption"),
        ("deep.er/a.cls", b"red\n"),
        ("b.json", json.dumps({"label": "blue", "colour": "amber"}).encode()),
        ("b.webp", None),
    ]
    train, _ = load_image_sets(shard(members))
    assert train.labels.tolist()[-2:] == [2, 1]


def test_the_field_of_the_json_may_be_named(shard, noisy_root):
    fields = json.dumps({"label": 7, "colour": 1}).encode()
    keys = {"DATA.LABEL_COLUMN": "colour", "DATA.TRAIN_PART": "train-zzz.tar"}
    cfg = shard([("b.json", fields), ("b.png", None), ("b.cls", b"7")], **keys)
    cfg.defrost()
    cfg.DATA.TEST_PART = "train-z*.tar"
    (noisy_root / "classes.txt").write_text("amber\nblue\nred\n")
    assert [one.labels.tolist() for one in load_image_sets(cfg)] == [[1], [1]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"red")], r"the sample 'a' has 0 images \(cls\), .* cut short$"),
        ([("a.png", None), ("a.jpg", None)], r"the sample 'a' has 2 images \(png, jpg\)"),
        ([("a.png", None)], r"the sample 'a' has no label: expected a .cls or .json beside png"),
        ([("a.png", None), ("b.png", None), ("a.cls", b"red")], r"sample 'a' has no label"),
        ([("a.png", None), ("a.cls", b"")], r"train-zzz.tar/a.png: the image has no label"),
        ([("a.png", None), ("a.cls", b"\xff")], r"the sample 'a': its .cls cannot be read"),
        ([("a.png", None), ("a.json", b"{")], r"the sample 'a': its .json cannot be read"),
        ([("a.png", None), ("a.json", b"3")], r"its .json has no 'label', .* fields: 3"),
        ([("a.png", None), ("a.json", b'{"class": 3}')], r"LABEL_COLUMN: .* fields: class"),
        ([("a.png", None), ("a.json", b'{"label": 1.5}')], r"a.png: the label 1.5 is neither t"),
        ([("a.png", b"no image"), ("a.cls", b"red")], r"the image '.*train-zzz.tar/a.png': cannot"),
        ([("a.png", None), ("a.cls", b"green")], r"only .* have 'green' \(first .*zzz.tar/a.png\)"),
    ],
)
def test_a_broken_sample_is_named_with_its_shard(shard, members, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_image_sets(shard(members, **{"DATA.STREAM": False}))
    assert "zzz" in str(refused.value) or "green" in message
    assert "\n" not in str(refused.value)


def test_processes_index_the_shards_alike_and_refuse_alike(written, noisy_root):
    alone, several = (load_image_sets(written("shards", **{"DATA.WORKERS": n})) for n in (0, 3))
    assert [one.fingerprint for one in alone] == [other.fingerprint for other in several]
    cfg = written("shards", **{"DATA.WORKERS": 3})
    (noisy_root / "train-002.tar").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"^.*train-002.tar: cannot be read as a tar") as refused:
        load_image_sets(cfg)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["compressed", "cut off", "no tar"])
def test_a_shard_that_is_no_whole_plain_tar_file_is_named(written, noisy_root, damage):
    cfg = written("shards")
    shard = noisy_root / "train-001.tar"
    content = shard.read_bytes()
    damaged = {
        "compressed": gzip.compress(content),
        "cut off": content[:3000],
        "no tar": b"x" * 999,
    }
    shard.write_bytes(damaged[damage])
    with pytest.raises(
        ConfigError, match=r"^.*train-001.tar: cannot be read as a tar file \(.*uncompressed"
    ):
        load_image_sets(cfg)


def test_shards_without_an_image_are_refused(shard):
    with pytest.raises(ConfigError, match=r"train-zzz.tar and the other train shards hold no imag"):
        load_image_sets(shard([("README", b"")], **{"DATA.TRAIN_PART": "train-zzz.tar"}))


def test_missing_shards_say_what_is_looked_for(written):
    cfg = written("shards", **{"DATA.TRAIN_PART": "learn"})
    with pytest.raises(
        ConfigError, match=r"expected shards such as .*learn-\*.tar, found none; DATA.TRAIN_PART"
    ):
        load_image_sets(cfg)
