"""Whole runs by the command line: train, resume, evaluate, export, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ROIAlign
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from PIL import Image

from detection import export, train_net, trainer
from detection.config import PROJECT, load_config, teacher_config
from detection.figures import read_metrics
from detection.preflight import check_run, read_run
from pcka.engine.command import TrainingFailedError
from pcka.engine.config import ConfigError
from pcka.engine.folder_lock import FolderInUseError, lock_folder
from pcka.taps import FeatureTap

pytestmark = pytest.mark.slow

DIGITS = PROJECT / "configs" / "detection" / "digits"


def _checkpoint(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_the_checkpoint_is_the_bare_student(tmp_path, arguments, build):
    train_net.main(arguments(tmp_path, 2))
    student = build(config="student")
    assert _checkpoint(tmp_path)["model"].keys() == student.state_dict().keys()


def test_a_run_leaves_figures_and_pictures(tmp_path, arguments):
    results = train_net.main(arguments(tmp_path, 4, "DISTILL.LOG_PERIOD", "2"))
    assert "AP" in results["bbox"]
    assert json.loads((tmp_path / "result.json").read_text())["bbox"].keys() == (
        results["bbox"].keys()
    )
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 5000
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    drawn = read_metrics(tmp_path / "metrics.json")
    for level in ("p3", "p4", "p5"):
        assert [step for step, _ in drawn[f"loss_pcka_{level}_rows"]] == [1, 3]
        assert any(entry.get(f"distill_grad/{level}", 0) > 0 for entry in logged)
        assert any(f"cka/{level}" in entry for entry in logged)


def test_eval_only_gives_the_figures_of_the_run(tmp_path, arguments):
    trained = train_net.main(arguments(tmp_path / "run", 2))
    weights = str(tmp_path / "run" / "model_final.pth")
    command = arguments(tmp_path / "eval", 2, "MODEL.WEIGHTS", weights, flags=["--eval-only"])
    # An absent class has AP nan, which is not equal to itself.
    assert str(train_net.main(command)) == str(trained)
    assert str(train_net.main(["--resume", *command])) == str(trained)  # again: no run is resumed
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"evaluation"}
    assert (tmp_path / "eval" / "evaluation" / "detections.png").stat().st_size > 5000


def test_a_run_that_ends_before_its_rate_has_risen_is_warned_of(small_config, caplog):
    check_run(small_config("student", "SOLVER.MAX_ITER", "20", "SOLVER.WARMUP_ITERS", "20"))
    (told,) = [text for text in caplog.messages if "SOLVER.WARMUP_ITERS" in text]
    assert "the rate rises over 20 steps, but SOLVER.MAX_ITER ends the run after 20" in told
    caplog.clear()
    check_run(small_config("student", "SOLVER.MAX_ITER", "20", "SOLVER.WARMUP_ITERS", "19"))
    assert not [text for text in caplog.messages if "SOLVER.WARMUP_ITERS" in text]


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("cuda", True)])
def test_torchscript_rounds_alike_on_cpus_and_fuses_on_gpus(monkeypatch, device, fused):
    seen = []
    monkeypatch.setattr(
        trainer.SimpleTrainer, "train",
        lambda *_: seen.append(torch._C._get_graph_executor_optimize()),
    )  # fmt: skip
    run = object.__new__(trainer.DetectionTrainer)
    run.run_state = SimpleNamespace(restore_random=lambda: None)
    run.model, run.results = SimpleNamespace(device=torch.device(device)), {}
    run.start = run.last = run._data_loader_iter = 0
    run.train_all()
    assert seen == [fused]


def test_statistics_are_averaged_before_they_are_saved_or_evaluated(monkeypatch):
    done = []
    monkeypatch.setattr(trainer, "average_buffers", lambda _: done.append(hook.trainer.iter + 1))
    hook = trainer._AverageBuffers(torch.nn.Identity(), {3, 4, 0})
    for step in range(10):
        hook.trainer = SimpleNamespace(iter=step, max_iter=10)
        hook.after_step()
    assert done == [3, 4, 6, 8, 9, 10]


def test_a_folder_in_which_another_run_works_is_refused(tmp_path, arguments):
    lock = lock_folder(tmp_path)
    with pytest.raises(FolderInUseError, match="another process is using"):
        train_net.main(arguments(tmp_path, 2))
    os.close(lock)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.BACKBONE.NAME", "nope", "unknown 'nope'; registered: .*resnet_fpn"),
        ("MODEL.DEVICE", "gpu", "expected 'cpu', 'cuda' or 'cuda:<number>', got 'gpu'"),
        ("MODEL.DEVICE", "meta", "expected 'cpu', 'cuda' or 'cuda:<number>', got 'meta'"),
        ("SOLVER.MAX_ITER", "0", "expected at least 1, got 0"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "expected at least 1, got 0"),
        ("SOLVER.IMS_PER_BATCH", "-2", "expected at least 1, got -2"),
        ("DISTILL.LOG_PERIOD", "-1", "expected at least 0, got -1"),
        ("DATALOADER.NUM_WORKERS", "-1", "expected at least 0, got -1"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "expected one or more sides in pixels, got none"),
        ("SOLVER.LR_SCHEDULER_NAME", "Foo", "expected one of .*, WarmupPolyLR, got 'Foo'"),
        ("SOLVER.WARMUP_FACTOR", "-0.1", r"expected at least 0, got -0\.1"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "-1.0", r"expected a bound above 0, got -1\.0"),
        ("SOLVER.WARMUP_METHOD", "foo", "expected one of linear, constant, got 'foo'"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo", "expected one of value, norm, got 'foo'"),
        ("OUTPUT_DIR", "", "expected a folder to write into, got ''"),
        ("OUTPUT_DIR", __file__, "expected a folder to write into"),
        ("TEST.PRECISE_BN.ENABLED", "True", "not supported; set it to False"),
        ("TEST.AUG.ENABLED", "True", "not supported; set it to False"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "8", "are not scaled here; set it to 0"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "would train without DISTILL"),
        ("DISTILL.INHERIT", "[1]", r"expected prefixes of the weights' names, .* got \[1\]"),
        ("DISTILL.INHERIT", "['head.']", "a teacher with random weights has none to inherit"),
    ],
)
def test_keys_that_would_be_ignored_or_fail_later_are_refused(
    tmp_path, arguments, key, value, message
):
    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        train_net.main(arguments(tmp_path, 2, key, value))


def test_losses_for_a_student_without_a_teacher_are_refused(tmp_path, arguments, at_once):
    losses = ("DISTILL.METHODS", "[PCKA]")  # also the default
    told = (
        r"^DISTILL.METHODS: has no effect, as .*student\.yaml trains a RetinaNet without a teacher"
    )
    with pytest.raises(ConfigError, match=told):
        train_net.main(arguments(tmp_path, 2, *losses, config="student"))
    given = arguments(tmp_path, 2, "DISTILL.TEACHER.WEIGHTS", "teacher.pth", config="student")
    read_run(given[1], given[2:])  # as a comparison gives it to all its runs


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("MOMENTUM", "-1.0", "Invalid momentum value: -1.0"), ("STEPS", "(5, 3)", "milestone=3")],
)
def test_a_solver_that_cannot_be_built_is_told_before_training(
    tmp_path, arguments, at_once, key, value, message
):
    with pytest.raises(ConfigError, match=f"^SOLVER: cannot be built .*{message}"):
        train_net.main(arguments(tmp_path, 9, f"SOLVER.{key}", value))


def test_a_training_that_diverges_ends_with_what_to_change(tmp_path, arguments):
    wild = ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0")
    with pytest.raises(TrainingFailedError, match=r"SOLVER.BASE_LR may be too high"):
        train_net.main(arguments(tmp_path, 4, *wild))


@pytest.fixture
def at_once(monkeypatch):
    """Nothing may be trained or evaluated."""
    for owner, name in ((trainer.SimpleTrainer, "train"), (train_net, "evaluate")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("the work has begun"))


def test_a_teacher_with_nothing_to_teach_is_refused_before_the_first_step(
    tmp_path, arguments, small_config, at_once
):
    backbone = build_backbone(teacher_config(small_config("pcka")))
    state = {f"backbone.{name}": tensor * 0 for name, tensor in backbone.state_dict().items()}
    torch.save(state, tmp_path / "zeros.pth")
    teacher = ("DISTILL.TEACHER.WEIGHTS", str(tmp_path / "zeros.pth"))
    with pytest.raises(ConfigError, match=r"zeros\.pth: the teacher's maps of p3 are the same"):
        train_net.main(arguments(tmp_path / "run", 2, *teacher))


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_test_set_that_cannot_be_read_is_refused_before_the_work(
    tmp_path, arguments, build, segmented, at_once, flags
):
    torch.save(build(config="student").state_dict(), tmp_path / "student.pth")
    keys = ("MODEL.WEIGHTS", str(tmp_path / "student.pth"), "DATASETS.TEST", f"['{segmented}']")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: .*there is no image .*a\.png"):
        train_net.main(arguments(tmp_path / "run", 2, *keys, flags=flags))


def test_an_evaluation_on_no_set_is_refused(tmp_path, arguments, at_once):
    keys = ("MODEL.WEIGHTS", "student.pth", "DATASETS.TEST", "()")
    with pytest.raises(ConfigError, match=r"DATASETS.TEST: expected a set of images .*, got none"):
        train_net.main(arguments(tmp_path, 2, *keys, flags=["--eval-only"]))


def test_two_test_sets_leave_their_files_apart(tmp_path, arguments):
    sets = ("digits_scenes_test", "digits_scenes_train")
    results = train_net.main(arguments(tmp_path, 1, "DATASETS.TEST", str(list(sets))))
    assert tuple(results) == sets
    for name in sets:
        assert (tmp_path / "inference" / name / "coco_instances_results.json").exists()


@pytest.fixture
def segmented(tmp_path):
    """The name of a set of two images, the left half of each another class."""
    truth = np.zeros((128, 128), np.uint8)
    truth[:, :64] = 1
    Image.fromarray(truth).save(tmp_path / "truth.png")
    for name in ("a.png", "b.png"):
        Image.effect_noise((128, 128), 50).convert("RGB").save(tmp_path / name)
    shared = {"height": 128, "width": 128, "sem_seg_file_name": str(tmp_path / "truth.png")}
    name = "halves_to_train_on"
    DatasetCatalog.register(
        name,
        lambda: [
            {**shared, "file_name": str(tmp_path / image), "image_id": image}
            for image in ("a.png", "b.png")
        ],
    )
    MetadataCatalog.get(name).set(stuff_classes=["right", "left"], ignore_label=255)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_a_segmenter_is_distilled_and_evaluated_by_its_pixels(tmp_path, arguments, segmented):
    keys = [
        "DISTILL.STUDENT", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p3', 'p4']",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32",
        "DATASETS.TRAIN", f"['{segmented}']", "DATASETS.TEST", f"['{segmented}']",
    ]  # fmt: skip
    results = train_net.main(arguments(tmp_path / "run", 2, *keys))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    figures = read_metrics(tmp_path / "run" / "metrics.json")
    assert {"loss_sem_seg", "loss_pcka_p3_rows", "sem_seg/mIoU"} <= figures.keys()


def test_mixed_precision_leaves_the_boxes_of_regions_where_they_are():
    """detectron2 brings them to the features' dtype: bfloat16 has no 1001."""

    class Head(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.pooler = ROIAlign(7, 1 / 8, 0, aligned=True)

        def forward(self, features):
            box = torch.tensor([[0.0, 1001, 16, 1061, 64]])
            return self.pooler(features, box)

    ramp = torch.arange(160.0).expand(1, 1, 16, 160).bfloat16()
    head = Head()
    expected = head(ramp.float())
    trainer.train_in_bfloat16(head)
    torch.testing.assert_close(head(ramp).float(), expected)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [("pcka", ""), ("student", ""), ("pcka", "FCOS"), ("pcka", "GFL"), ("pcka", "RepPoints")],
)
def test_mixed_precision_trains_near_float32_and_evaluates_in_it(
    build, batch, storage, own_detector, config, architecture
):
    own = own_detector(architecture)
    exact, mixed = build(*own, config=config), build(*own, config=config)
    trainer.train_in_bfloat16(mixed)
    student = trainer.student_of(mixed)
    with FeatureTap(student.backbone, {"level": ":p3"}) as tap:
        terms = mixed.train()(batch)
        assert tap.pop()["level"].dtype == torch.bfloat16
        sum(terms.values()).backward()
        for evaluated in (mixed, student):
            evaluated.eval()(batch)
            assert tap.pop()["level"].dtype == torch.float32
    expected = exact.train()(batch)
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        assert 0 < abs(terms[name] - term) < 0.05 * term + 0.02, name
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert {grad.dtype for grad in gradients} == {torch.float32}
    assert all(grad.isfinite().all() for grad in gradients)


@pytest.mark.parametrize("architecture", ["RetinaNet", "FCOS", "GFL", "RepPoints"])
def test_plain_detectron2_gives_the_exported_students_boxes(
    tmp_path,
    small_arguments,
    own_detector,
    architecture,
    assert_same_boxes_in_plain_detectron2,
):
    keys = ("DISTILL.STUDENT", architecture, *own_detector(architecture))
    overrides = small_arguments(*keys, f"MODEL.{architecture.upper()}.SCORE_THRESH_TEST", "0.0")
    cfg = load_config(str(DIGITS / "pcka.yaml"), overrides)
    torch.manual_seed(0)
    student = META_ARCH_REGISTRY.get(architecture)(cfg).eval()
    torch.save({"model": student.state_dict()}, tmp_path / "trained.pth")
    exported = export.main(
        ["--config-file", str(DIGITS / "pcka.yaml"), "--weights", str(tmp_path / "trained.pth"),
         "--output", str(tmp_path / "out"), *overrides]
    )  # fmt: skip
    image = torch.randint(256, (3, 128, 96), dtype=torch.uint8)
    assert_same_boxes_in_plain_detectron2(exported, student, image)


def test_heads_can_be_inherited(tmp_path, arguments, build, caplog):
    teacher = build(config="student")
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    keys = ("DISTILL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "DISTILL.TEACHER.OPTS")
    same = str(["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
                "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16])  # fmt: skip
    given = arguments(
        tmp_path / "run", 1, *keys, same, "DISTILL.INHERIT", "['head.']", "SOLVER.BASE_LR", "0.0"
    )
    train_net.main(given)
    head = {n: t for n, t in teacher.state_dict().items() if n.startswith("head.")}
    learned = _checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(learned[name], tensor) for name, tensor in head.items())
    with pytest.raises(ConfigError, match=r"DISTILL\.INHERIT: under 'nothing\.'"):
        train_net.main(
            arguments(tmp_path / "bad", 1, *keys, same, "DISTILL.INHERIT", "['nothing.']")
        )
    rgb = same.replace("[", "['INPUT.FORMAT', 'RGB', ")
    stem = "DISTILL.INHERIT: backbone.bottom_up.stem.conv1.weight reads images, and INPUT.FORMAT"
    with pytest.raises(ConfigError, match=stem):
        train_net.main(
            arguments(tmp_path / "rgb", 1, *keys, rgb, "DISTILL.INHERIT", "['backbone.']")
        )
    train_net.main(arguments(tmp_path / "rgb", 1, *keys, rgb, "DISTILL.INHERIT", "['head.']"))


COUNTING = """
import sys
from detection import train_net
train_net.main(sys.argv[1:])
ours = ("pcka", "detection", "classification", "benchmarks", "tools")
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ours))
"""


def test_a_training_imports_few_modules_of_ours(tmp_path, arguments):
    command = [sys.executable, "-W", "ignore", "-c", COUNTING, *arguments(tmp_path, 1)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    modules = done.stdout.splitlines()[-1].split()
    assert "pcka.losses.pcka" in modules
    assert len(modules) <= 75, modules


@pytest.mark.parametrize("methods", ["['PCKA']", "['CROSSKD', 'DENSEKD', 'FGD', 'MGD']"])
def test_two_processes_train_resume_and_evaluate(tmp_path, arguments, methods):
    # A group norm of 32 channels takes no map of one position, as P7 of one such image is.
    teacher = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RETINANET.NORM", ""]
    chosen = ("DISTILL.METHODS", methods, "DISTILL.CROSSKD.DEPTH", "1")
    chosen += ("DISTILL.TEACHER.OPTS", str([*teacher, "MODEL.FPN.OUT_CHANNELS", 64]))

    def torchrun(steps, *flags):
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
        script = str(PROJECT / "detection" / "train_net.py")
        # The processes' images are of unlike sizes, and so are their maps.
        sizes = ("INPUT.MIN_SIZE_TRAIN", "[64, 128]")
        words = arguments(tmp_path, steps, *sizes, *chosen, flags=flags)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command, script, *words],
            capture_output=True, text=True, cwd=PROJECT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    torchrun(2)
    assert _checkpoint(tmp_path)["iteration"] == 1
    torchrun(4, "--resume")
    assert _checkpoint(tmp_path)["iteration"] == 3
    assert "AP" in json.loads((tmp_path / "result.json").read_text())["bbox"]
