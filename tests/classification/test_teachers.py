"""Several teachers: as one model with the first one's stages, in every command."""

from __future__ import annotations

import pytest
import torch

from classification import evaluate
from classification.config import load_config, teacher_name, teachers_of
from classification.data import load_image_sets
from classification.models import create_model
from classification.run import run_experiment, untrained_pair
from classification.show_taps import tap_table
from classification.sweep import run_side_by_side
from classification.teacher import check_teacher, prepare_teacher
from pcka.engine.config import ConfigError

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def other_teacher(tmp_path):
    """The checkpoint of a resnet14 as it is made."""
    torch.manual_seed(1)
    torch.save(create_model("resnet14", 10).state_dict(), tmp_path / "other.pth")
    return tmp_path / "other.pth"


@pytest.fixture
def data_sets(tiny_config):
    return load_image_sets(tiny_config())


@pytest.fixture
def joint_config(pair_config, other_teacher):
    """A run from the resnet8 that ``pair_config`` has and a resnet14."""

    def config(method="kd", name="joint", **keys):
        others = f"[{{NAME: resnet14, WEIGHTS: {other_teacher}}}]"
        return pair_config(method, name, **{"TEACHER.OTHERS": others, **keys})

    return config


def test_what_another_teacher_does_not_say_is_as_the_first_one_has_it(tiny_config):
    others = (
        "[{NAME: resnet14, SEED: 7, KWARGS: {width: 2}}, {NAME: vgg8, PIXEL_MEAN: [0, 1, 0.5]}]"
    )
    keys = {"TEACHER.OTHERS": others, "TEACHER.WEIGHTS": "first.pth", "TEACHER.KWARGS": "{a: 1}"}
    cfg = tiny_config("kd", **keys)
    first, second, third = (one.TEACHER for one in teachers_of(cfg))
    assert [s.NAME for s in (first, second, third)] == ["resnet8", "resnet14", "vgg8"]
    assert [s.WEIGHTS for s in (first, second, third)] == ["first.pth", "", ""]
    assert [dict(s.KWARGS) for s in (first, second, third)] == [{"a": 1}, {"width": 2}, {}]
    assert [s.SEED for s in (first, second, third)] == [0, 7, 0]
    assert second.PIXEL_MEAN == first.PIXEL_MEAN and third.PIXEL_MEAN == [0.0, 1.0, 0.5]
    assert second.TRAIN and second.EPOCHS == 1
    assert teacher_name(cfg) == "resnet8 + resnet14 + vgg8"


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"OTHERS": "[resnet14]"}, r"TEACHER\.OTHERS\[0\]: expected keys of a teacher.*'resnet14'"),
        ({"OTHERS": "[{WEIGHTS: a}]"}, r"TEACHER\.OTHERS\[0\]: expected keys of a teacher"),
        (
            {"OTHERS": "[{NAME: a}, {NAME: b, WEIGHT: c}]"},
            r"OTHERS\[1\]: unknown key 'WEIGHT'; near",
        ),
        ({"OTHERS": "[{NAME: a, SEED: x}]"}, r"TEACHER\.OTHERS\[0\]: SEED expects a int"),
        (
            {"OTHERS": "[{NAME: a, EPOCHS: 0}]"},
            r"TEACHER\.OTHERS\[0\]\.EPOCHS: expected at least 1",
        ),
        ({"OTHERS": "[{NAME: a, SEED: -3}]"}, r"OTHERS\[0\]\.SEED: expected at least 0, got -3"),
        (
            {"OTHERS": "[{NAME: a}, {NAME: b, BN_MOMENTUM: .nan}]"},
            r"TEACHER\.OTHERS\[1\]\.BN_MOMENTUM: expected a finite number",
        ),
        (
            {"OTHERS": "[{NAME: a, PIXEL_STD: [1, 0, 1]}]"},
            r"TEACHER\.OTHERS\[0\]\.PIXEL_STD: expected three",
        ),
        (
            {"OTHERS": "[{NAME: a}]", "SHARES": "[1]"},
            r"TEACHER\.SHARES: expected 2 numbers above 0",
        ),
        ({"OTHERS": "[{NAME: a}]", "SHARES": "[1, 0]"}, r"TEACHER\.SHARES: expected 2 numbers"),
        ({"OTHERS": "[{NAME: a}]", "NAME": ""}, r"TEACHER\.NAME: .* need a first teacher"),
    ],
)
def test_what_is_wrong_with_several_teachers_is_told_by_its_key(tiny_config, keys, match):
    with pytest.raises(ConfigError, match=match):
        tiny_config("kd", **{f"TEACHER.{key}": value for key, value in keys.items()})


def test_each_teachers_weights_are_looked_for(joint_config, tmp_path):
    check_teacher(joint_config())
    missing = joint_config(**{"TEACHER.OTHERS": "[{NAME: resnet14, WEIGHTS: absent.pth}]"})
    with pytest.raises(ConfigError, match=r"TEACHER\.WEIGHTS: there is no file 'absent\.pth'"):
        check_teacher(missing)
    none = joint_config(**{"TEACHER.OTHERS": "[{NAME: resnet14}]", "TEACHER.TRAIN": False})
    with pytest.raises(ConfigError, match="the teacher 'resnet14' has no weights"):
        check_teacher(none)
    joint = joint_config()
    joint.TEACHER.OTHERS[0]["WEIGHTS"] = str(tmp_path / "other.pth")
    joint.TEACHER.OTHERS[0]["NAME"] = "resnet20"
    with pytest.raises(
        ConfigError, match=r"TEACHER\.WEIGHTS: .*is not the checkpoint of a resnet20"
    ):
        run_experiment(joint)


@pytest.mark.parametrize("method", ["kd", "ofd", "srrl"])
def test_a_teacher_beside_itself_teaches_what_it_teaches_alone(
    pair_config, random_teacher, tmp_path, assert_same_run, method
):
    """OFD reads its batch norms before their folding, SRRL its classifier, both by their paths."""
    run_experiment(pair_config(method, "alone"))
    twice = {"TEACHER.OTHERS": f"[{{NAME: resnet8, WEIGHTS: {random_teacher}}}]"}
    result = run_experiment(pair_config(method, "twice", **twice))
    assert_same_run(tmp_path / "twice", tmp_path / "alone")
    assert result["teacher"] == "resnet8 + resnet8"


def test_the_teachers_see_pixels_by_their_own_statistics(joint_config, other_teacher, data_sets):
    statistics = {"PIXEL_MEAN": [0.4, 0.5, 0.6], "PIXEL_STD": [0.1, 0.2, 0.4]}
    others = [{"NAME": "resnet14", "WEIGHTS": str(other_teacher), **statistics}]
    cfg = joint_config(**{"TEACHER.OTHERS": others, "TEACHER.SHARES": "[1, 3]"})
    teacher = prepare_teacher(cfg, data_sets, train_run=None)
    pixels = torch.rand(5, 3, 16, 16)

    def column(values):
        return torch.tensor(values).view(3, 1, 1)

    logits = []
    for name, file, own in (
        ("resnet8", cfg.TEACHER.WEIGHTS, cfg.TEACHER), ("resnet14", other_teacher, statistics)
    ):  # fmt: skip
        model = create_model(name, 10).eval()
        model.load_state_dict(torch.load(file, weights_only=True))
        logits.append(model((pixels - column(own["PIXEL_MEAN"])) / column(own["PIXEL_STD"])))
    mean, std = column(cfg.TEACHER.PIXEL_MEAN), column(cfg.TEACHER.PIXEL_STD)
    given = teacher.model((pixels - mean) / std)
    torch.testing.assert_close(given, 0.25 * logits[0] + 0.75 * logits[1], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.model.modules())


def test_teachers_that_differ_by_their_seed_are_trained_one_by_one(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "pcka")
    cfg = tiny_config("kd", **{"TEACHER.OTHERS": "[{NAME: resnet8, SEED: 1}]"})
    result = run_experiment(cfg)
    files = sorted((tmp_path / "teachers").glob("*.pth"))
    assert len(files) == 2
    assert not all(
        torch.equal(*pair)
        for pair in zip(*(torch.load(f, weights_only=True).values() for f in files))
    )
    told = [text for text in caplog.messages if "accuracy" in text and text.startswith("teacher")]
    assert len(told) == 3 and told[2].startswith("teacher resnet8 + resnet8: accuracy")
    assert f"{result['teacher_accuracy']:.2f}" in told[2]


def test_the_first_ones_stages_are_tapped_and_any_ones_modules_can_be(joint_config, tmp_path):
    cfg = joint_config("fcka", **{"DISTILL.TAPS": "[[stage4, layer3, members.1.layer2]]"})
    _, teacher = untrained_pair(cfg)
    assert teacher.stage_names[1:] == tuple(f"members.0.layer{i}" for i in (1, 2, 3))
    table = tap_table(cfg)
    assert "teacher: resnet8 + resnet14" in table and "members.1.layer2" in table
    cfg = joint_config("fcka", **{
        "DISTILL.TAPS": "[[stage4, layer3, members.1.layer2]]", "DISTILL.FCKA.STAGES": "[stage4]"
    })  # fmt: skip
    run_experiment(cfg)
    assert "loss_fcka_stage4" in (tmp_path / "joint" / "metrics.jsonl").read_text()


def test_several_teachers_teach_students_side_by_side_and_from_disk(
    joint_config, tmp_path, assert_same_run
):
    kept = {"TEACHER.OUTPUTS": tmp_path / "outputs"}
    run_experiment(joint_config("kd", "alone"))
    run_side_by_side([joint_config(m, f"both/{m}", **kept) for m in ("kd", "srrl")])
    run_experiment(joint_config("kd", "disk", **kept))
    for name in ("both/kd", "disk"):
        assert_same_run(tmp_path / name, tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"TEACHER\.OUTPUTS: .* was made with TEACHER\.SHARES"):
        run_experiment(joint_config("kd", "other", **kept, **{"TEACHER.SHARES": "[1, 2]"}))


def test_a_run_of_several_teachers_goes_on_from_its_saved_configuration(joint_config, tmp_path):
    cfg = joint_config("kd", **{"TEACHER.SHARES": "[1, 2.5]"})
    run_experiment(cfg)
    again = load_config(tmp_path / "joint" / "config.yaml")
    assert again == cfg
    assert run_experiment(again, resume=True)["epochs"] == 2


def test_evaluate_measures_the_teachers_as_one(joint_config, tiny_overrides, tmp_path):
    cfg = joint_config()
    expected = run_experiment(cfg)["teacher_accuracy"]
    assert evaluate.evaluate(cfg, role="teacher")["top1"] == pytest.approx(expected, abs=2.6)
    first = evaluate.evaluate(cfg, role="teacher", weights=cfg.TEACHER.WEIGHTS)
    assert first.keys() == {"top1", "top5"}


def test_the_example_of_the_documentation_is_read(digits_config, tmp_path):
    page = (digits_config.parents[3] / "docs" / "classification.md").read_text()
    example = (
        page.partition("### Several teachers")[2].partition("```yaml\n")[2].partition("```")[0]
    )
    (tmp_path / "three.yaml").write_text(f"_BASE_: {digits_config}\n{example}")
    cfg = load_config(tmp_path / "three.yaml")
    assert teacher_name(cfg) == "resnet56 + vgg13 + resnet56"
    assert [one.TEACHER.WEIGHTS for one in teachers_of(cfg)] == ["resnet56.pth", "vgg13.pth", ""]
    assert teachers_of(cfg)[2].TEACHER.SEED == 1
