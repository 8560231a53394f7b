"""Two processes with half of every batch each learn what one process learns from all of it.

Run as a script (``FOLDER RANK``), this file is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pcka import losses
from pcka.analysis import cka_matrix
from pcka.distiller import Distiller
from pcka.distributed import (
    average_buffers,
    average_over_processes,
    from_first_process,
    gather_batch,
    gather_outputs,
    rank,
    sum_over_processes,
    world_size,
)
from pcka.losses import Context, Outputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
WORLD, BATCH, STEPS, CLASSES, TRAINING_SET = 2, 8, 2, 5, 20
WIDTH, TEACHER_WIDTH, SIDE = 4, 6, 32

# Losses with more than one form, or a random one.
PATCHES = {"patch_sizes": (2,)}
FORMS = {
    "CC": [{"form": "neighbours"}, {"form": "bilinear"}],
    "LCKA": [{"temperature": 4.0}, {"center": False, "row_normalize": True}],
    # Masks are drawn by each process for its own samples: compared without any.
    "MGD": [{"mask_ratio": 0.0}],
    "PATCHED": [{**PATCHES, "method": method} for method in ("at", "kl", "pkd", "dist")],
    "PCKA": [
        {**PATCHES, "group_by": group_by, "relations": ("rows", "columns")}
        for group_by in ("channel", "batch", "position")
    ],
}
CASES = {
    "-".join([name, *(str(value) for value in keywords.values())]): (name, keywords)
    for name in losses.names()
    if not losses.build(name).of_detectors
    for keywords in FORMS.get(name, [{}])
}


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_part(x: Tensor) -> Tensor:
    """What this process has of a batch."""
    return x.chunk(world_size())[rank()]


class Net(nn.Sequential):
    """Answers with a dict, as models of other libraries do."""

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        return {"loss": None, "logits": super().forward(images)}


def net(width: int, seed: int, stride: int = 1) -> Net:
    """Three stages and a classifier without batch norm; module paths are the taps' names."""
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, channels in enumerate((3, width, width), start=1):
        step = stride if stage == 1 else 2
        layers[f"stage{stage}_preact"] = nn.Conv2d(channels, width, 3, step, padding=1)
        layers[f"stage{stage}"] = nn.ReLU()
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["pooled"] = nn.Flatten()
    layers["head"] = nn.Linear(width, CLASSES)
    return Net(layers)


def make_distiller(name: str, keywords: dict) -> Distiller:
    """The loss beside cross-entropy, which keeps the whole student in use; all in float64.

    The teacher's maps are wider than the student's, and have half their sides.
    """
    student = net(WIDTH, 0)
    teacher = net(TEACHER_WIDTH, 1, stride=2)
    paths = [path for path, _ in teacher.named_children()]
    taps = {path: path for path in paths} | {"last": "stage3"}
    methods = [losses.build(name, **keywords)]
    if name != "CE":
        methods.append(losses.build("CE"))
    distiller = Distiller(student, teacher, methods, taps).double()
    norm = normal(2, 2, TEACHER_WIDTH)
    context = Context(
        train_labels=torch.arange(TRAINING_SET) % CLASSES,
        teacher_classifier=teacher.head,
        teacher_norms={path: (norm[0], norm[1]) for path in paths if path.endswith("preact")},
    )
    distiller.prepare(normal(3, 2, 3, SIDE, SIDE), context=context)
    return distiller


def train(name: str, keywords: dict) -> dict[str, object]:
    """Terms and gradients of some steps, and the state after them.

    Batch norms of the losses' adapters stay in evaluation mode: in training, each process takes
    the statistics of its own part.
    """
    distiller = make_distiller(name, keywords)
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in distiller.losses.modules())
    distiller.train(not normalized)
    model = DistributedDataParallel(distiller) if world_size() > 1 else distiller
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    terms, gradients = [], []
    for step in range(STEPS):
        images = normal(10 + step, BATCH, 3, SIDE, SIDE)
        indices = torch.arange(BATCH) + step * BATCH // 2  # half of them come again
        found = model(own_part(images), own_part(indices % CLASSES), indices=own_part(indices))
        optimizer.zero_grad()
        sum(found.values()).backward()
        terms.append({term: value.detach() for term, value in found.items()})
        gradients.append({path: p.grad.clone() for path, p in distiller.named_parameters()})
        optimizer.step()
    return {"terms": terms, "gradients": gradients, "state": distiller.state_dict()}


def apart() -> dict[str, object]:
    """Terms and student gradient of each process's own batch, whose maps have a size of their own.

    The terms are means over samples or of each process: the gradient is that of their mean.
    """
    student, teacher = net(WIDTH, 0), net(TEACHER_WIDTH, 1, stride=2)
    chosen = [losses.build("PKD"), losses.build("FCKA"), losses.build("CE")]
    distiller = Distiller(student, teacher, chosen, {"last": "stage3"}, gather=False).double()
    parts = [normal(20 + i, BATCH, 3, SIDE + 16 * i, SIDE) for i in range(WORLD)]
    distiller.prepare(parts[0])
    torch.nn.init.ones_(distiller.adapters["last"].weight)
    own = range(WORLD) if world_size() == 1 else [rank()]
    model = DistributedDataParallel(distiller) if world_size() > 1 else distiller
    found = [model(parts[i], torch.arange(BATCH) % CLASSES) for i in own]
    sum(sum(terms.values()) for terms in found).div(len(own)).backward()
    return {
        "terms": [{name: value.detach() for name, value in terms.items()} for terms in found],
        "gradient": student.stage1_preact.weight.grad,
    }


def relate(batch: Tensor) -> Tensor:
    """A scalar in which every sample meets every other one at its place in the batch."""
    rows = batch.flatten(1)
    places = torch.arange(1, len(rows) + 1, dtype=rows.dtype)
    return ((rows @ rows.T).sin() * places[:, None] / places).sum()


def gradient_through_gathering() -> Tensor:
    part = own_part(normal(4, BATCH, 3, 2, 2)).requires_grad_()
    relate(gather_batch(part)).backward()
    return part.grad


def gathered_outputs() -> Outputs:
    features = {"read": own_part(normal(6, BATCH, 3)), "unread": torch.zeros(rank() + 1)}
    logits = own_part(normal(5, BATCH, CLASSES))
    return gather_outputs(Outputs(logits, features, own_part(torch.arange(BATCH))), ["read"])


def communicate() -> dict[str, object]:
    """What each function of pcka.distributed gives in this process."""
    own, outputs = rank() + 1.0, gathered_outputs()
    total = torch.tensor([rank() + 1, 10])
    sum_over_processes(total)
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(own)
    norm.running_var.copy_(torch.tensor([own, 0.1]))
    norm.num_batches_tracked.fill_(7)
    module = nn.Sequential(norm)
    module.register_buffer("pixel_mean", torch.tensor(float(rank())))  # of no norm
    average_buffers(module)
    averaged = [torch.full((2, 3), own).T, torch.tensor(10 * own), torch.empty(0)]
    average_over_processes(averaged)
    layouts = {
        "half": own_part(normal(7, BATCH, 2)).bfloat16(),
        "integers": own_part(torch.arange(BATCH)),
        "transposed": own_part(normal(7, 3, BATCH).T),
        "channels_last": own_part(normal(7, BATCH, 3, 2, 2)).to(memory_format=torch.channels_last),
    }
    return {
        "rank": rank(),
        "order": gather_batch(torch.full((2, 1), rank())),
        "layouts": {name: gather_batch(x) for name, x in layouts.items()},
        "outputs": [outputs.logits, dict(outputs.features), outputs.indices],
        "gradient": gradient_through_gathering(),
        "sum": total,
        "averaged": averaged,
        "first": from_first_process({"value": own, "tensor": torch.tensor([own])}),
        "buffers": {**dict(norm.named_buffers()), "pixel_mean": module.pixel_mean},
    }


def small_net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)).double()


CKA_BATCHES = [normal(8 + i, samples, 5) for i, samples in enumerate((6, 5, 8))]


def alignments() -> dict[str, Tensor]:
    """CKA of all layers where both processes have batches, and where the first one has all."""
    shared, alone = (CKA_BATCHES[:1], CKA_BATCHES) if rank() == 0 else (CKA_BATCHES[1:], [])
    return {
        name: cka_matrix(small_net(4), small_net(6), batches).values
        for name, batches in (("shared", shared), ("alone", alone))
    }


def run(folder: Path, own_rank: int) -> None:
    """Be one of the processes; write what came out."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=own_rank, world_size=WORLD
    )
    trained = {case: train(*arguments) for case, arguments in CASES.items()}
    several = {"communication": communicate(), "apart": apart(), "cka": alignments()}
    torch.save({**trained, **several}, folder / f"{own_rank}.pth")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What came out of each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(WORLD)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{number}.pth", weights_only=True) for number in range(WORLD)]


@pytest.fixture(scope="module")
def communication(processes) -> list[dict]:
    return [process["communication"] for process in processes]


def assert_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def test_cka_of_all_layers_is_of_the_batches_of_all_processes(processes):
    whole = cka_matrix(small_net(4), small_net(6), CKA_BATCHES).values
    for process in processes:
        assert_close(process["cka"], {"shared": whole, "alone": whole})


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(processes, case):
    """Loss, gradients of student and adapters, and what a loss remembers."""
    one, several = train(*CASES[case]), [process[case] for process in processes]
    for own in several:
        assert_close(own["gradients"], one["gradients"])
        assert_close(own["state"], one["state"])
    relational = losses.build(CASES[case][0]).relational
    for step, whole in enumerate(one["terms"]):
        parts = [own["terms"][step] for own in several]
        for term, value in whole.items():
            found = torch.stack([part[term] for part in parts])
            if term == "loss_ce" or not relational:
                found = found.mean(0, keepdim=True)
            assert_close(found, value.expand(len(found)))


def test_without_gathering_each_process_compares_its_own_batch(processes):
    """Also where the processes' maps are of two sizes, which cannot be gathered."""
    one = apart()
    for own_rank, process in enumerate(processes):
        assert_close(process["apart"]["terms"], one["terms"][own_rank : own_rank + 1])
        assert_close(process["apart"]["gradient"], one["gradient"])


def test_every_case_trains_the_student_by_its_loss():
    """So that none of them agrees by being zero."""
    for name, keywords in CASES.values():
        first, _ = train(name, keywords)["terms"]
        assert all(value.abs() > 1e-6 for value in first.values()), name


def test_processes_gather_by_rank(communication):
    for own_rank, own in enumerate(communication):
        assert own["rank"] == own_rank
        assert own["order"].flatten().tolist() == [0, 0, 1, 1]


def test_a_gathered_batch_is_the_whole_one_in_any_dtype_and_layout(communication):
    whole = {
        "half": normal(7, BATCH, 2).bfloat16(),
        "integers": torch.arange(BATCH),
        "transposed": normal(7, 3, BATCH).T,
        "channels_last": normal(7, BATCH, 3, 2, 2),
    }
    outputs = [normal(5, BATCH, CLASSES), {"read": normal(6, BATCH, 3)}, torch.arange(BATCH)]
    for own in communication:
        torch.testing.assert_close(own["layouts"], whole, rtol=0, atol=0, check_stride=False)
        torch.testing.assert_close(own["outputs"], outputs, rtol=0, atol=0)


def test_the_mean_over_processes_of_a_gathered_gradient_is_that_of_the_whole_batch(communication):
    """Each process's own part comes out ``WORLD`` times too large: the mean takes that away."""
    batch = normal(4, BATCH, 3, 2, 2).requires_grad_()
    relate(batch).backward()
    found = torch.cat([own["gradient"] for own in communication]) / WORLD
    torch.testing.assert_close(found, batch.grad, rtol=1e-12, atol=1e-12)


def test_figures_are_summed_and_told(communication):
    for own in communication:
        assert own["sum"].tolist() == [3, 20]
        assert own["first"] == {"value": 1.0, "tensor": torch.tensor([1.0])}


def test_statistics_are_averaged_counts_and_other_buffers_kept(communication):
    for own in communication:
        assert own["buffers"]["running_mean"].tolist() == [1.5, 1.5]
        torch.testing.assert_close(own["buffers"]["running_var"], torch.tensor([1.5, 0.1]))
        assert own["buffers"]["num_batches_tracked"] == 7
    assert [own["buffers"]["pixel_mean"] for own in communication] == [0, 1]


def test_tensors_are_averaged_in_place(communication):
    for own in communication:
        matrix, number, nothing = own["averaged"]
        assert matrix.tolist() == [[1.5, 1.5]] * 3
        assert number == 15
        assert nothing.shape == (0,)


def test_one_process_communicates_with_none():
    whole = communicate()
    assert (whole["rank"], world_size()) == (0, 1)
    assert whole["order"].flatten().tolist() == [0, 0]
    assert whole["sum"].tolist() == [1, 10]
    assert whole["averaged"][1] == 10
    part = normal(4, BATCH, 3, 2, 2)
    assert gather_batch(part) is part


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
