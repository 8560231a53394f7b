"""CKA of all layers of two models, compared with other packages: values, time and memory.

``python -m benchmarks.layer_cka [--rounds R] [--batches N]``. resnet56 against resnet32, every
convolution and the classifier, on random images of CIFAR's size, batch 128; calls take turns. The
packages ``torch_cka`` and ``pytorch-cka`` take part if they are installed. All three use the
unbiased estimator of HSIC and sum it over the batches.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import interleave, markdown
from classification.models import create_model
from pcka.analysis import cka_matrix
from pcka.analysis.memory import peak_growth

MODELS = "resnet56", "resnet32"

SLOW = "torch_cka"  # recomputes a layer's Gram for each layer of the other model: one round
Loader = DataLoader[Any]


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs=2, default=MODELS, metavar="M")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    models = [_model(name) for name in given.models]
    layers = [_layers(model) for model in models]
    images = torch.rand(given.batches * given.batch_size, 3, 32, 32)
    loader = DataLoader(TensorDataset(images), given.batch_size)
    found = [name for name in METHODS if importlib.util.find_spec(METHODS[name][0])]
    calls = {name: partial(METHODS[name][1], *models, loader, *layers) for name in found}
    a, b = (copy.deepcopy(model).double() for model in models)
    in_float64 = DataLoader(TensorDataset(images.double()), given.batch_size)
    # The packages clamp their values; unbiased estimates may be below 0.
    exact = cka_matrix(a, b, in_float64, layers[0], layers[1]).values.clamp(0, 1)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        values = {name: call() for name, call in calls.items()}
        doubled = {
            name: METHODS[name][1](a, b, in_float64, *layers) for name in found if name != SLOW
        }
        peaks = {name: peak_growth(call) for name, call in calls.items()}
        rounds = {name: 1 if name == SLOW else given.rounds for name in calls}
        seconds = interleave(calls, rounds, sample_seconds=0.0, timer=cpu_seconds)
    figures = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "mebibytes": peaks[name] / 2**20,
            "error": _difference(values[name], exact),
            "error_in_float64": _difference(doubled[name], exact) if name in doubled else nan,
        }
        for name in calls
    }
    _print(given, list(map(len, layers)), figures)
    return figures


def _print(
    given: argparse.Namespace, layers: Sequence[int], figures: Mapping[str, Mapping[str, float]]
) -> None:
    models = " x ".join(f"{name} ({n} layers)" for name, n in zip(given.models, layers))
    print(
        f"{models}, {given.batches} batches of {given.batch_size}, {given.threads} threads, median "
        f"of {given.rounds} ({SLOW}: 1)"
    )
    rows = [
        [
            name,
            f"{of['seconds']:.3f}",
            f"{of['mebibytes']:.0f}",
            f"{of['error']:.1e}",
            f"{of['error_in_float64']:.1e}",
        ]
        for name, of in figures.items()
    ]
    print(markdown(["", "CPU seconds", "peak (MiB)", "largest error", "with float64 models"], rows))


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    """Return the mean CPU seconds of a call, which other processes do not lengthen."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def _difference(values: Tensor, exact: Tensor) -> float:
    return (values.double().clamp(0, 1) - exact).abs().max().item()


def _model(name: str) -> nn.Module:
    """Return the model, its batch norms run on images so that no feature vanishes or explodes."""
    model = create_model(name, 100)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(64, 3, 32, 32))
    return model.eval()


def _layers(model: nn.Module) -> list[str]:
    kinds = nn.Conv2d, nn.Linear
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _with_pcka(
    a: nn.Module, b: nn.Module, loader: Loader, layers_a: list[str], layers_b: list[str]
) -> Tensor:
    return cka_matrix(a, b, loader, layers_a, layers_b).values


@torch.no_grad()
def _with_torch_cka(
    a: nn.Module, b: nn.Module, loader: Loader, layers_a: list[str], layers_b: list[str]
) -> Tensor:
    package = importlib.import_module("torch_cka")
    # It never removes its hooks.
    copies = copy.deepcopy(a), copy.deepcopy(b)
    compared = package.CKA(*copies, "a", "b", layers_a, layers_b, device="cpu")
    compared.compare(loader)
    values: Tensor = compared.export()["CKA"]
    return values


def _with_pytorch_cka(
    a: nn.Module, b: nn.Module, loader: Loader, layers_a: list[str], layers_b: list[str]
) -> Tensor:
    package = importlib.import_module("cka")
    (values,) = package.compute_cka(
        a, b, loader, layers=layers_a, model2_layers=layers_b, device="cpu", progress=False
    )
    found: Tensor = values
    return found


# Distribution name -> the module that it installs, and the function that calls it.
METHODS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "pcka": ("pcka", _with_pcka),
    "pytorch-cka": ("cka", _with_pytorch_cka),
    "torch_cka": ("torch_cka", _with_torch_cka),
}


if __name__ == "__main__":
    main()
