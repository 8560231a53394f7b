from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pcka.losses import PCKA, DegenerateLevelWarning, Outputs, pcka_loss

RECORDS = list(
    itertools.product(
        ("channel", "batch", "position"),
        ((2, 6, 32, 48), (2, 5, 33, 40), (3, 4, 20, 50)),
        (False, True),
    )
)


@pytest.mark.parametrize(("group_by", "shape", "inter"), RECORDS)
def test_record_of_the_original_implementation(meets_record, group_by, shape, inter):
    relations = ("rows", "columns") if inter else ("rows",)

    def loss(student, teacher):
        options = {"group_by": group_by, "center": False}
        return sum(
            10 * (pcka_loss(student, teacher, relation=relation, **options) - 1)
            for relation in relations
        )

    meets_record(f"pcka_{group_by}_{shape}_inter{inter}", loss)


def test_centered_loss_from_the_definition(draw):
    student, teacher = draw(0, 2, 3, 8, 12) + 1, draw(1, 2, 3, 8, 12)
    aligned = []
    for channel in range(3):
        x, y = (
            np.stack(
                [
                    maps[:, channel, top : top + 4, left : left + 4].numpy().ravel()
                    for top in range(0, 8, 4)
                    for left in range(0, 12, 4)
                ]
            )
            for maps in (student, teacher)
        )
        h = np.eye(6) - 1 / 6
        k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
        aligned.append((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
    loss = pcka_loss(student, teacher, patch_size=4)
    assert loss.item() == pytest.approx(1 - np.mean(aligned), rel=1e-10)


def test_scaled_maps_cost_nothing(draw):
    x = draw(0, 2, 3, 8, 12)
    assert pcka_loss(3 * x, x, patch_size=4).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 8, 8), {"patch_size": 8}),
        ((2, 3, 5, 9), {"patch_size": (8, 8)}),
        ((2, 3, 8, 8), {"patch_size": 8, "center": False}),
        ((2, 3, 4, 4), {"patch_size": 1, "relation": "columns"}),
        ((2, 2, 4, 4), {"patch_size": 1, "relation": "columns", "group_by": "batch"}),
        ((2, 1, 4, 4), {"patch_size": 2, "relation": "columns", "group_by": "position"}),
    ],
)
def test_a_map_of_too_few_patches_is_left_out_with_one_warning(draw, shape, options):
    student = draw(0, *shape).requires_grad_()
    with pytest.warns(DegenerateLevelWarning, match="pcka_loss: ") as caught:
        losses = [pcka_loss(student, draw(1, *shape), **options) for _ in range(2)]
    assert len(caught) == 1
    sum(losses).backward()
    assert losses[0].item() == 0
    assert student.grad.count_nonzero() == 0


def test_module_gives_a_weighted_term_a_stage_and_relation(draw):
    student = {"a": draw(0, 2, 3, 8, 12), "b": draw(1, 2, 3, 8, 8)}
    teacher = {"a": draw(2, 2, 3, 8, 12), "b": draw(3, 2, 3, 8, 8)}
    loss = PCKA(
        stages=["a", "b"],
        weights=[10.0, 0.5],
        patch_sizes=[4, [2, 4]],
        group_by="batch",
        relations=["rows", "columns"],
        center=False,
    )
    assert loss.taps == ("a", "b")
    terms = loss(Outputs(features=student), Outputs(features=teacher), None)
    assert list(terms) == [
        f"loss_pcka_{stage}_{relation}" for stage in "ab" for relation in ("rows", "columns")
    ]
    for stage, weight, patch in (("a", 10.0, 4), ("b", 0.5, (2, 4))):
        for relation in ("rows", "columns"):
            expected = weight * pcka_loss(
                student[stage],
                teacher[stage],
                patch_size=patch,
                group_by="batch",
                relation=relation,
                center=False,
            )
            torch.testing.assert_close(terms[f"loss_pcka_{stage}_{relation}"], expected)


def test_settings_of_each_level_are_complete():
    with pytest.raises(ValueError, match="patch_sizes must hold one value for each of the 2"):
        PCKA(stages=("a", "b"), patch_sizes=(8, 8, 8))
    with pytest.raises(ValueError, match="weights must hold one value for each of the 2"):
        PCKA(stages=("a", "b"), weights=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"patch_size must be a positive int.*got 1\.5"):
        PCKA(patch_sizes=1.5)
    with pytest.raises(
        ValueError, match=r"relations must hold each name once, got \['rows', 'rows'"
    ):
        PCKA(relations=["rows", "rows"])
    with pytest.raises(ValueError, match=r"relations must be a list of names, got 'rows'"):
        PCKA(relations="rows")


def test_needs_a_teacher(draw):
    with pytest.raises(ValueError, match="teacher: PCKA needs it"):
        PCKA()(Outputs(features={"last": draw(0, 2, 3, 8, 12)}), None, None)


def test_the_background_counts_less(draw):
    own, other = draw(0, 2, 3, 8, 8), draw(1, 2, 3, 8, 8)
    boxes = torch.tensor([[0, 0.0, 0.25, 0.5, 0.75], [1, 0.5, 0.5, 1.0, 1.0]])
    weights = torch.full((2, 1, 8, 8), 0.3, dtype=torch.float64)
    weights[0, :, 2:6, :4] = 1
    weights[1, :, 4:, 4:] = 1
    student, teacher = Outputs(features={"p3": own}), Outputs(features={"p3": other})
    loss = PCKA(stages=["p3"], patch_sizes=2, weights=2.0, background=0.3)
    assert loss.needs_boxes
    terms = loss(student, teacher, boxes)
    expected = 2 * pcka_loss(own * weights, other * weights, patch_size=2)
    assert terms == {"loss_pcka_p3_rows": expected}
    with pytest.raises(ValueError, match="target: PCKA needs it, got None"):
        loss(student, teacher, None)


def test_the_whole_map_counts_unless_told(draw):
    maps = [Outputs(features={"p3": draw(seed, 2, 3, 8, 8)}) for seed in (0, 1)]
    loss = PCKA(stages=["p3"], patch_sizes=2)
    assert not loss.needs_boxes
    assert loss(*maps, None) == PCKA(stages=["p3"], patch_sizes=2, background=1)(*maps, None)


@pytest.mark.parametrize("background", [-0.1, 1.5, float("nan")])
def test_a_background_is_a_factor_from_0_to_1(background):
    with pytest.raises(ValueError, match="background must be a factor from 0 to 1, got"):
        PCKA(background=background)
