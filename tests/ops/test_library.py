"""What the compiled operators are called with: the workspace, and where gradients are scaled."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pcka
from pcka.ops import _library

pytestmark = pytest.mark.skipif(
    not pcka.build_info()["extension"], reason="the compiled operators are not loaded"
)


class Calls(TorchDispatchMode):
    """The operators of pcka that run within it, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pcka":
            self.made.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))

    def arguments(self, name: str) -> tuple[object, ...]:
        (found,) = [args for made, args in self.made if made == f"pcka::{name}"]
        return found


def calls_of_a_step(device: str) -> Calls:
    student = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    teacher = torch.randn(2, 3, 8, 8, device=device)
    with Calls() as calls:
        pcka.patch_cka(student, teacher, patch_size=4).sum().backward()
    return calls


def test_the_workspace_is_that_of_the_environment_beside_a_cpu(monkeypatch):
    monkeypatch.setattr(_library, "_WORKSPACE", _library._workspace_bytes("64"))
    assert calls_of_a_step("meta").arguments("patch_cka")[-1] == 64 << 20
    assert len(calls_of_a_step("cpu").arguments("patch_cka")) == 8  # the default


def test_the_workspace_is_a_whole_number_of_mebibytes():
    assert _library._workspace_bytes(None) == _library._workspace_bytes("") == 0
    for text in ("0", "-1", "1.5", "1 GiB"):
        with pytest.raises(ImportError, match=f"positive whole number of MiB, got '{text}'"):
            _library._workspace_bytes(text)


@pytest.mark.parametrize(("device", "own"), [("cpu", True), ("meta", False)])
def test_a_gradient_is_scaled_in_its_own_memory_on_a_cpu_alone(device, own):
    out, gradient, *_ = calls_of_a_step(device).arguments("scale_groups_")
    assert (out is gradient) == own
