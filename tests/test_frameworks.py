"""The examples of docs/frameworks.md run as they stand there, each in its framework."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from classification.models import create_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "frameworks.md").read_text()
SAMPLES = [(torch.linspace(i, i + 9, 768).sin().view(3, 16, 16), i % 10) for i in range(16)]


def example(title: str, number: int = 0) -> str:
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for granted; they write into the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {
        "student": create_model("resnet8", 10),
        "teacher": create_model("resnet8x4", 10),
        "loader": DataLoader(SAMPLES, batch_size=8),
    }


def is_trained(before: nn.Module, after: nn.Module) -> bool:
    after = after.cpu()
    return all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning(names):
    start, taught = copy.deepcopy(names["student"]), copy.deepcopy(names["teacher"].state_dict())
    exec(example("Lightning"), names)
    assert is_trained(start, names["student"])
    torch.testing.assert_close(names["teacher"].state_dict(), taught, rtol=0, atol=0)
    assert torch.load("student.pth").keys() == start.state_dict().keys()
    (path,) = Path.cwd().rglob("*.ckpt")
    state = torch.load(path)["state_dict"]
    assert {name.split(".")[1] for name in state} == {"student", "adapters"}
    models = {"student": start, "teacher": names["teacher"], "images": torch.randn(2, 3, 16, 16)}
    loaded = names["Distillation"].load_from_checkpoint(path, **models)
    torch.testing.assert_close(loaded.state_dict(), names["module"].state_dict())


@pytest.mark.slow
def test_accelerate(names):
    start = copy.deepcopy(names["student"])
    exec(example("Accelerate"), names)
    assert is_trained(start, names["student"])
    assert all(term.dtype == torch.float32 for term in names["terms"].values())
    assert load_file("student.safetensors").keys() == start.state_dict().keys()
    state = names["accelerator"].get_state_dict(names["distiller"])
    assert {name.split(".")[0] for name in state} == {"student", "adapters"}


@pytest.mark.slow
def test_accelerate_in_two_processes_trains_one_student_and_one_adapter(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, __file__],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    states = [torch.load(tmp_path / f"state{rank}.pth") for rank in range(2)]
    for name, value in states[0].items():
        if "running" not in name:  # batch norm's statistics are each process's own
            torch.testing.assert_close(value, states[1][name], rtol=0, atol=0, msg=name)
    assert (tmp_path / "student.safetensors").exists()


def in_a_process() -> None:
    """One of the processes of the test above; each starts its models from other weights."""
    torch.manual_seed(int(os.environ["RANK"]))
    models = {"student": create_model("resnet8", 10), "teacher": create_model("resnet8x4", 10)}
    names = {**models, "loader": DataLoader(SAMPLES, batch_size=4)}
    exec(example("Accelerate"), names)
    distiller = names["distiller"]
    assert isinstance(distiller, DistributedDataParallel)
    torch.save(distiller.module.state_dict(), f"state{os.environ['RANK']}.pth")
    names["accelerator"].end_training()


@pytest.mark.slow
def test_the_trainer_of_transformers(names):
    from transformers import ViTConfig, ViTForImageClassification

    def vit(width: int) -> nn.Module:
        settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 10}
        sizes = {"image_size": 16, "patch_size": 4, "intermediate_size": width}
        return ViTForImageClassification(ViTConfig(hidden_size=width, **sizes, **settings))

    samples = [{"pixel_values": image, "labels": label} for image, label in SAMPLES]
    names |= {"student": vit(8), "teacher": vit(16), "train_set": samples, "test_set": samples}
    start = copy.deepcopy(names["student"])
    exec(example("Hugging Face Trainer"), names)
    assert is_trained(start.classifier, names["student"].classifier)
    predicted = names["trainer"].predict(samples)
    assert predicted.predictions.shape == (16, 10)
    assert ViTForImageClassification.from_pretrained("student").config.hidden_size == 8
    (path,) = Path("output").rglob("model.safetensors")
    assert {name.split(".")[0] for name in load_file(path)} == {"student"}


@pytest.mark.slow
def test_timm(names):
    start = copy.deepcopy(names["student"])
    exec(example("timm"), names)
    assert is_trained(start, names["student"])
    assert is_trained(start, names["average"].module)


def test_a_model_that_takes_keywords(names):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 4), nn.Linear(4, 10)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            words = self.embedding(input_ids) * attention_mask[..., None]
            return {"logits": self.head(words.mean(1))}

    names |= {"student": Text(), "teacher": Text(), "labels": torch.arange(4)}
    names |= {"tokens": torch.arange(20).view(4, 5), "mask": torch.ones(4, 5)}
    exec(example("Models that take keywords"), names)
    assert names["terms"].keys() == {"loss_ce", "loss_kd"}


class Concat(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, 1)


class Head(nn.Module):
    """Predictions of each level: in evaluation joined, as YOLOv8's are decoded then."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 6, 1) for width in widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        found = [conv(level) for conv, level in zip(self.convs, maps, strict=True)]
        return found if self.training else torch.cat([level.flatten(2) for level in found], 2)


READS = {11: [-1, 6], 14: [-1, 4], 17: [-1, 12], 20: [-1, 9], 22: [15, 18, 21]}


class YoloLayout(nn.Module):
    """The 23 modules of YOLOv8 in their order, and what each of them reads, with small ones."""

    def __init__(self, w: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))

        up = nn.Upsample(scale_factor=2)
        backbone = [conv(3, w, 2), conv(w, w, 2), conv(w, w), conv(w, w, 2), conv(w, w)]
        backbone += [conv(w, 2 * w, 2), conv(2 * w, 2 * w), conv(2 * w, 4 * w, 2)]
        backbone += [conv(4 * w, 4 * w), conv(4 * w, 4 * w)]
        neck = [up, Concat(), conv(6 * w, 2 * w), copy.deepcopy(up), Concat(), conv(3 * w, w)]
        neck += [conv(w, w, 2), Concat(), conv(3 * w, 2 * w)]
        neck += [conv(2 * w, 2 * w, 2), Concat(), conv(6 * w, 4 * w)]
        self.model = nn.Sequential(*backbone, *neck, Head(w, 2 * w, 4 * w))

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        outputs: list[Tensor] = []
        for number, module in enumerate(self.model):
            if number in READS:
                x = [x if source == -1 else outputs[source] for source in READS[number]]
            x = module(x)
            outputs.append(x)
        return x


def test_a_detector_that_is_laid_out_as_yolov8(names):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 256, 256)
    names |= {"student": YoloLayout(2), "teacher": YoloLayout(3), "twin": YoloLayout(2)}
    names |= {"images": images, "loader": [{"img": images, "boxes": torch.zeros(1, 5)}] * 2}
    names["criterion"] = lambda predictions, batch: sum(p.square().mean() for p in predictions)
    start = copy.deepcopy(names["student"])
    exec(example("Other detectors"), names)
    pcka_terms = {f"loss_pcka_{level}_rows" for level in ("p3", "p4", "p5")}
    assert names["terms"].keys() == {"loss_task", *pcka_terms}
    assert all(names["terms"][term] > 0 for term in pcka_terms)
    assert sorted(names["distiller"].adapters) == ["p3", "p4", "p5"]
    assert is_trained(start, names["student"])
    names["student"].zero_grad()
    exec(example("Other detectors", 1), names)
    assert names["student"].model[0][0].weight.grad.norm() > 0


if __name__ == "__main__":
    in_a_process()
