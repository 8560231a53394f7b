from __future__ import annotations

from types import SimpleNamespace

import pytest

from pcka.engine import progress
from pcka.engine.progress import Progress


@pytest.fixture
def lines(monkeypatch, caplog):
    """``lines(seconds)``: what a work of four steps of ten images, each so long, logs."""
    caplog.set_level("INFO", "pcka")
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(seconds):
        with Progress("epoch 1/3", 40) as bar:
            for _ in range(4):
                now[0] += seconds
                bar.update(10)
        return caplog.messages

    return run


def test_without_a_terminal_a_line_every_half_minute_tells_how_far_it_is(lines):
    assert lines(18) == ["epoch 1/3: 20 of 40 images", "epoch 1/3: 40 of 40 images"]


def test_what_is_quick_logs_nothing(lines):
    assert lines(7) == []


def test_other_processes_log_nothing(lines, monkeypatch):
    monkeypatch.setattr(progress, "rank", lambda: 1)
    assert lines(100) == []
