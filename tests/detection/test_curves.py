from __future__ import annotations

import json

from detection.curves import read_metrics


def test_steps_that_were_trained_again_count_once(tmp_path):
    path = tmp_path / "metrics.json"
    # Killed after step 59, resumed from step 40; evaluated at step 79; torn at the end.
    steps = [(19, 1.0), (39, 2.0), (59, 3.0), (59, 4.0), (79, 5.0), (79, 6.0)]
    steps[3:3] = [(39, 2.5)]
    lines = [json.dumps({"iteration": step, "total_loss": loss}) for step, loss in steps]
    path.write_text("\n".join(lines) + '\n{"iteration": 99, "tot')
    read = [(entry["iteration"], entry["total_loss"]) for entry in read_metrics(path)]
    assert read == [(19, 1.0), (39, 2.0), (39, 2.5), (59, 4.0), (79, 5.0), (79, 6.0)]
    assert read_metrics(tmp_path / "none.json") == []
