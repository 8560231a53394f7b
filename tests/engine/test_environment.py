from __future__ import annotations

import pytest
import torch

from pcka.engine.environment import (
    autocast,
    choose_device,
    describe_environment,
    has_bfloat16,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("key", "hardware", "expected"),
    [
        ("", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_autocast_takes_bfloat16_where_it_is_asked_for_or_in_the_hardware(
    monkeypatch, key, hardware, expected
):
    monkeypatch.setattr("pcka.engine.environment.has_bfloat16", lambda device: hardware)
    x = torch.ones(2, 2)
    with autocast(key, CPU):
        assert (x @ x).dtype == expected
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ({"neon": True}, False),
    ],
)
def test_a_cpu_has_bfloat16_by_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) is expected


def test_a_torch_that_cannot_tell_counts_as_a_cpu_without(monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert has_bfloat16(CPU) is False


@pytest.mark.parametrize("supported", [False, True])
def test_a_gpu_has_bfloat16_where_it_need_not_be_emulated(monkeypatch, supported):
    def in_hardware(including_emulation=True):
        return including_emulation or supported

    monkeypatch.setattr("torch.cuda.is_bf16_supported", in_hardware)
    assert has_bfloat16(CUDA) is supported


def test_cuda_is_taken_where_it_is_there_by_the_process_s_own_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 3)


def test_cuda_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(
        ValueError, match=r"DEVICE: cuda is not available; set DEVICE to cpu or auto"
    ):
        choose_device("cuda")


def test_the_environment_says_what_the_figures_were_made_with(monkeypatch):
    monkeypatch.setattr("pcka.engine.environment.has_bfloat16", lambda device: True)
    described = describe_environment(7, CPU)
    assert (described["seed"], described["device"], described["processes"]) == (7, "cpu", 1)
    assert described["threads"] == torch.get_num_threads()
    assert described["bfloat16_hardware"] is True
    assert torch.__version__.startswith(described["torch"])
