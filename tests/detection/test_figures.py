from __future__ import annotations

import json

import matplotlib.image
import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from detection.figures import plot_run, read_metrics


@pytest.fixture
def run(tmp_path):
    """``run(steps, start=0)``: train a distilled run's figures, by detectron2's own writer."""
    path = tmp_path / "metrics.json"

    def train(steps, start=0, evaluated=()):
        writer = JSONWriter(str(path))
        with EventStorage(start) as storage:
            for step in range(start, steps):
                storage.iter = step
                storage.put_scalar("loss_cls", 1.0 / (1 + step))
                if step % 20 == 0:
                    storage.put_scalar("cka/p3", step / 100, smoothing_hint=False)
                if step + 1 in evaluated:
                    storage.put_scalar("bbox/AP", float(step), smoothing_hint=False)
                if (step + 1) % 20 == 0:
                    writer.write()
            storage.iter = steps
            storage.put_scalar("bbox/AP", float(steps), smoothing_hint=False)
            writer.write()
        writer.close()
        return path

    return train


def _steps(path):
    return {key: [step for step, _ in points] for key, points in read_metrics(path).items()}


def test_every_figure_of_a_distilled_run_is_read(run):
    """The alignment of step 0 stands behind the losses of step 19 in the file."""
    path = run(80, evaluated=(25, 50))
    lines = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert lines != sorted(lines)
    assert _steps(path) == {
        "loss_cls": [19, 39, 59, 79],
        "cka/p3": [0, 20, 40, 60],
        "bbox/AP": [24, 49, 80],
    }


def test_steps_that_were_trained_again_count_once(run):
    run(70, evaluated=(25, 50))
    path = run(80, start=40, evaluated=(50,))
    assert _steps(path)["loss_cls"] == [19, 39, 59, 79]
    assert _steps(path)["cka/p3"] == [0, 20, 40, 60]
    assert _steps(path)["bbox/AP"] == [24, 49, 80]


def test_a_torn_line_and_what_could_not_be_computed_are_left_out(tmp_path):
    path = tmp_path / "metrics.json"
    assert read_metrics(path) == {}
    torn = '{"iteration": 19, "lo'
    whole = '{"iteration": 9, "bbox/AP": NaN, "loss": 1.0}\n'
    path.write_text(whole + torn + whole + torn)
    assert read_metrics(path) == {"loss": [(9, 1.0)]}


@pytest.mark.parametrize("line", [b"\xff\xfe", b"{}", b"3", b'{"iteration": null}'])
def test_a_damaged_line_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.json"
    path.write_bytes(line + b'\n{"iteration": 9, "loss": 1.0}\n')
    assert read_metrics(path) == {"loss": [(9, 1.0)]}


def test_the_picture_has_a_panel_for_each_kind_of_figure(run, tmp_path):
    for steps, evaluated in ((80, (25, 50)), (20, ())):
        (tmp_path / "metrics.json").unlink(missing_ok=True)
        run(steps, evaluated=evaluated)
        plot_run(str(tmp_path))
        height, width, _ = matplotlib.image.imread(tmp_path / "curves.png").shape
        assert round(width / height * 3.8 / 5.0) == 3


def test_the_axis_begins_at_step_0_and_a_single_figure_can_be_read_off(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pcka.engine.curves.Figure.savefig", lambda figure, *_, **__: drawn.append(
        figure
    ))  # fmt: skip
    run(20)
    plot_run(str(tmp_path))
    _, evaluations, alignment = drawn[0].axes
    assert evaluations.get_xlim()[0] == alignment.get_xlim()[0] == 0
    assert evaluations.get_ylim()[0] == 0
    assert evaluations.get_legend().get_texts()[0].get_text() == "bbox/AP: 20"
    assert len(evaluations.lines) == 2  # the point, and a line across
