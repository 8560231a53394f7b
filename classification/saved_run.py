"""The existing contents of a run's folder, and whether a run may resume from them."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from classification.config import changed_keys, config_from_text, load_config
from pcka.engine.config import ConfigError
from pcka.engine.run_folder import RunFolder
from pcka.engine.saved_state import load_state as load_checked
from pcka.engine.saved_state import refusal

Result = dict[str, object]

# What ``Trainer.state`` writes; ``adapters`` may be missing, see ``with_adapters``.
PARTS: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "best": dict,
    "seconds": (int, float),
    "student": dict,
    "losses": dict,
    "optimizer": dict,
    "random": dict,
    "config": str,
    "images": list,
}
BEST = {"best_accuracy", "best_epoch"}


def load_state(cfg: CfgNode, path: Path) -> dict:
    """Return the state that a run resumes from; refuse that of a different run."""
    saved = load_checked(path, PARTS | {"ema": dict} if cfg.SOLVER.EMA_DECAY else PARTS)
    if lacking := BEST - saved["best"].keys():
        raise refusal(path, f"its 'best' has no {', '.join(sorted(lacking))}")
    try:
        of_saved = config_from_text(saved["config"])
    except Exception as error:  # damaged text makes YAML and the merge raise nearly anything
        raise refusal(path, f"its configuration cannot be read ({error})") from error
    if changed := changed_keys(of_saved, cfg):
        way_out = "continue it with its config.yaml, or choose another OUTPUT_DIR"
        if "SOLVER.EPOCHS" in changed and cfg.SOLVER.EPOCHS > of_saved.SOLVER.EPOCHS:
            way_out += _prolonged(of_saved, cfg)
        raise ConfigError(
            f"OUTPUT_DIR: the run in {cfg.OUTPUT_DIR!r} was started with other values of "
            f"{', '.join(changed)}; {way_out}"
        )
    if saved["epoch"] > cfg.SOLVER.EPOCHS:
        raise ConfigError(
            f"SOLVER.EPOCHS: the run in {cfg.OUTPUT_DIR!r} already has {saved['epoch']} epochs, "
            f"{cfg.SOLVER.EPOCHS} are requested; choose another OUTPUT_DIR"
        )
    return saved


def _prolonged(old: CfgNode, new: CfgNode) -> str:
    """Say how to train a student further after its schedule has ended."""
    last = Path(new.OUTPUT_DIR) / "model_last.pth"
    solver = old.SOLVER
    return (
        f". Its rates depend on SOLVER.EPOCHS; to train further from its last weights, give, "
        f"without --resume, STUDENT.WEIGHTS {last} OUTPUT_DIR {new.OUTPUT_DIR}-further "
        f"SOLVER.EPOCHS {new.SOLVER.EPOCHS - solver.EPOCHS} SOLVER.BASE_LR {solver.BASE_LR / 10:g} "
        "SOLVER.WARMUP_EPOCHS 0 DISTILL.WARMUP 0"
    )


def result_alone(cfg: CfgNode, files: RunFolder, traces: list[str]) -> Result:
    """Return the result of a finished run whose checkpoint was removed to save space.

    Raises:
        ConfigError: it is a different or unfinished run, which can be neither taken for this one
            nor continued; training anew would overwrite it.
    """
    result, config = files.read_result(), files.directory / "config.yaml"
    if (
        result is not None
        and result.get("epochs") == cfg.SOLVER.EPOCHS
        and config.exists()
        and not changed_keys(load_config(config), cfg)
    ):
        return result
    raise ConfigError(
        f"OUTPUT_DIR: {str(files.directory)!r} holds a run ({', '.join(traces)}) without its "
        f"{files.checkpoint.name}, which is needed to continue it; put that file back, "
        "choose another OUTPUT_DIR, or remove the folder to train again"
    )
