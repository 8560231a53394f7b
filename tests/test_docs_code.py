"""Every block of code in the pages is run by a test, or checked here, or says why it is not.

Python is run by the test beside it in ``RUN``. Of shell commands the arguments exist, the
configuration files are there, and the keys take their values; of YAML the keys are known. A block
that none of this holds for has ``<!-- not run: REASON -->`` in front of it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from classification.compare import read_variants
from classification.config import default_config
from classification.config import load_config as load_classification
from detection.config import detection_config, load_config, section_defaults
from pcka import cli, losses
from pcka.engine.arguments import take_pairs
from pcka.engine.config import flatten
from pcka.engine.trainers import trainer_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
# Page and language -> the test that runs its blocks, and how many they are.
RUN = {
    ("README.md", "python"): ("test_readme.py", 1),
    ("docs/analysis.md", "python"): ("test_readme.py", 2),
    ("docs/classification.md", "python"): ("classification/test_own_models.py", 1),
    ("docs/data.md", "python"): ("classification/data/test_source.py", 1),
    ("docs/detection.md", "python"): ("detection/test_detection_export.py", 1),
    ("docs/extending.md", "cpp"): ("test_extending.py", 3),
    ("docs/extending.md", "diff"): ("test_extending.py", 7),
    ("docs/extending.md", "python"): ("test_extending.py", 4),
    ("docs/extending.md", "sh"): ("test_extending.py", 5),
    ("docs/extending.md", "yaml"): ("test_extending.py", 2),
    ("docs/frameworks.md", "python"): ("test_frameworks.py", 7),
    ("docs/library.md", "python"): ("test_readme.py", 2),
    ("docs/start.md", "python"): ("test_readme.py", 1),
}
NO_CODE = {"", "bibtex"}  # pictures, contents of files, citations
DIGITS = "configs/classification/digits/resnet20_resnet8.yaml"
SCENES = "configs/detection/digits/pcka.yaml"
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n+\Z")


class Block(NamedTuple):
    page: str
    language: str
    text: str
    explained: bool  # a comment in front of it says why it is not run

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            explained = bool(NOT_RUN.search(text[: found.start()]))
            yield Block(str(page.relative_to(ROOT)), found[1], found[2], explained)


BLOCKS = list(blocks())
CHECKED = [b for b in BLOCKS if not b.explained and (b.page, b.language) not in RUN]


def of(language: str) -> list[Block]:
    return [block for block in CHECKED if block.language == language]


def test_every_block_is_run_or_checked_or_says_why_not():
    unchecked = [str(b) for b in CHECKED if b.language not in {*NO_CODE, "sh", "yaml"}]
    assert not unchecked, "run it in a test that RUN names, or put <!-- not run: ... --> before it"
    for (page, language), (test, count) in RUN.items():
        here = [b for b in BLOCKS if (b.page, b.language) == (page, language) and not b.explained]
        assert len(here) == count, (
            f"{page} has {len(here)} blocks of {language}; does {test} run all?"
        )
        assert Path(page).name in (ROOT / "tests" / test).read_text()


# --- shell ---------------------------------------------------------------------------------------


class ParsedError(Exception):
    """Raised by a command in place of what it would do after reading its arguments."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given[0] if isinstance(given, tuple) else given


@pytest.fixture
def parsing(monkeypatch):
    """Commands read their arguments, and end."""
    depth = 0

    def only_parse(name: str) -> None:
        parse = getattr(argparse.ArgumentParser, name)

        def parsed(*arguments: Any, **keywords: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                given = parse(*arguments, **keywords)
            finally:
                depth -= 1
            if depth == 0:
                raise ParsedError(given)
            return given

        monkeypatch.setattr(argparse.ArgumentParser, name, parsed)

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        only_parse(name)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, with the variables that the block sets put in."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", text)
    text = re.sub(r"\[KEY VALUE …\]", "", text)
    text = re.sub(r" \[(--[^\]]*)\]", r" \1", text)  # an option that may be left out
    variables: dict[str, str] = {}
    for line in text.splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        if words:
            yield [word for each in words for word in expanded(each)]


def expanded(word: str) -> list[str]:
    """As the shell expands ``a/{b,c}.yaml``."""
    braces = re.fullmatch(r"([\w/.-]+)\{([\w,]+)\}([\w/.-]*)", word)
    return [braces[1] + part + braces[3] for part in braces[2].split(",")] if braces else [word]


def check_command(words: list[str]) -> None:
    """Fail where a command, as a page has it, would be refused for its arguments."""
    program, *rest = words
    if program == "srun":
        check_command(rest[rest.index("torchrun") :])
    elif program == "torchrun":
        with pytest.raises(ParsedError) as parsed:
            get_args_parser().parse_args(rest)
        check_command(
            ["python", parsed.value.given.training_script, *parsed.value.given.training_script_args]
        )
    elif program == "pcka":
        files = [ROOT / named(word, DIGITS) for word in rest if word.endswith(".yaml")]
        # Of a run's folder nothing is known here; only a detector's report takes --teacher.
        detectors = rest[0] == "report" and "--teacher" in rest
        trainer = "detection" if detectors else "classification"
        trainer = trainer_of(files[0]) if files else trainer
        check_module(cli.COMMANDS[rest[0]][0].replace("*", trainer), rest[1:])
    elif program == "python":
        module = rest[1] if rest[0] == "-m" else rest[0].removesuffix(".py").replace("/", ".")
        check_module(module, rest[2:] if rest[0] == "-m" else rest[1:])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest[0]
    elif program == "pip":
        check_extras(rest)
    else:
        assert program in {"export", "."}, f"{program}: a program that this test does not know"


def check_module(module: str, words: list[str]) -> None:
    main = getattr(importlib.import_module(module), "main", None)
    if main is None:  # `build`, and scripts without options
        return
    try:
        main(words)
    except SystemExit as end:  # after an error in the arguments, or what --list prints
        assert not end.code, "the arguments are refused"
    except ParsedError as parsed:
        check_settings(module, words, parsed.given)


def check_settings(module: str, words: list[str], given: argparse.Namespace) -> None:
    """Fail where the configuration of a trainer would be refused."""
    if module.startswith("classification."):
        pairs = settings(given, take_pairs(words, default_config())[1])
        file = ROOT / named(getattr(given, "config_file", None), DIGITS)
        for method in getattr(given, "methods", None) or [getattr(given, "method", "")]:
            load_classification(file, pairs, method)
    if module.startswith("detection."):
        pairs = settings(given, take_pairs(words, detection_config())[1])
        for file in getattr(given, "config_files", [getattr(given, "config_file", "")]):
            load_config(str(ROOT / named(file, SCENES)), pairs)


def named(file: object, stand_in: str) -> str:
    """A configuration file, or one in place of `F`, of what a run leaves and of a reader's own."""
    own = "output/" in str(file) or "/" not in str(file)
    return stand_in if not file or own else str(file)


def settings(given: argparse.Namespace, pairs: list[str]) -> list[str]:
    """The ``KEY VALUE`` pairs of a command that takes some out before it parses the others."""
    parsed = getattr(given, "overrides", None) or getattr(given, "opts", None) or []
    return parsed if parsed[: len(pairs)] == pairs else [*pairs, *parsed]


def check_extras(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for word in words:
        for extra in re.findall(r"\.\[(.*)\]", word):
            names = Requirement(f"pcka[{extra}]").extras
            assert all(re.search(rf"^{name} = \[", extras, re.MULTILINE) for name in names), extra


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands_are_such_as_the_programs_take(block, parsing, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in commands(block.text):
        try:
            check_command(words)
        except (SystemExit, AssertionError) as error:
            pytest.fail(f"{shlex.join(words)}: {error}\n{capsys.readouterr().err}")


# Those with arguments: one that is named without them is meant as a name.
WITHIN = re.compile(
    r"`((?:python (?:-m )?[^\s`]+|pcka (?:cka|doctor|epochs|grams|report)|make|torchrun) [^`…]+)`"
)
INLINE = sorted(
    (str(page.relative_to(ROOT)), " ".join(command.split()))
    for page in PAGES
    if page.stem != "extending"
    for command in {*WITHIN.findall(page.read_text())}
)


@pytest.mark.parametrize(("page", "command"), INLINE)
def test_commands_within_a_sentence_are_such_as_the_programs_take(
    page, command, parsing, monkeypatch
):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python classification/train.py --config-file F --no-such-option",
        "python detection/train_net.py --config-file F --no-such-option",
        "torchrun --nproc-per-node 2 classification/train.py --methods kd",
        "pcka cka --no-such-option",
        "python -m benchmarks.method_costs --no-such-option",
    ],
)
def test_an_option_that_does_not_exist_is_seen(command, parsing):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(command))


@pytest.mark.parametrize(
    "command",
    [
        "python classification/train.py --config-file F SOLVER.EPOCH 3",
        "python classification/train.py --config-file configs/no_such.yaml",
        "python classification/compare.py --methods ce no_such --config-file F",
        "python detection/train_net.py --config-file configs/detection/digits/pcka.yaml NO.SUCH 3",
        "make no-such-target",
        "pip install -e '.[no_such]'",
        "no-such-program",
    ],
)
def test_a_key_a_file_or_a_target_that_does_not_exist_is_seen(command, parsing, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, OSError, ValueError)):
        check_command(shlex.split(command))


# --- YAML ----------------------------------------------------------------------------------------


def known_keys() -> set[str]:
    """Every key of either trainer, and of every loss, with the sections that they are in."""
    keys = {*flatten(default_config()), *flatten(detection_config())}
    for name in losses.names():
        keys |= {f"DISTILL.{name}.{key}" for key in section_defaults(name)}
    return keys | {"_BASE_"}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_configurations_have_known_keys(block, tmp_path):
    values = yaml.safe_load(block.text)
    if any(name.islower() for name in values):  # for compare.py --variants
        file = tmp_path / "variants.yaml"
        file.write_text(block.text)
        for variant in read_variants(file).values():
            load_classification(ROOT / DIGITS, variant.overrides, variant.method)
    else:
        assert not {*leaves(values)} - known_keys()
