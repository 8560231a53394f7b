"""The available configuration files and methods; quick to import."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs" / "classification"


def method_files(config_file: str | Path | None = None) -> dict[str, Path]:
    """Return name -> file of all methods; those beside the configuration file take precedence."""
    folders = [CONFIGS] if config_file is None else [CONFIGS, Path(config_file).parent]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("methods/*.yaml"))}


def catalog() -> str:
    """Return the configuration files and the methods, one per line."""
    runs = sorted(
        path
        for path in CONFIGS.rglob("*.yaml")
        if path.parent != CONFIGS and path.parent.name != "methods" and path.stem != "base"
    )
    lines = ["Configurations (--config-file F):"]
    lines += [f"  configs/classification/{path.relative_to(CONFIGS)}" for path in runs]
    lines += ["", "Methods (--method M, on any of them):"]
    lines += [f"  {name:16s} {_headline(path)}" for name, path in method_files().items()]
    return "\n".join(lines)


def _headline(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")
