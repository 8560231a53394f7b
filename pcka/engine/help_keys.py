"""Every configuration key with its default and explanation, from where it is defined."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pcka import losses
from pcka.engine.distill import section_defaults

WIDTH = 100


class Key(NamedTuple):
    """A configuration key and its explanation."""

    name: str
    default: object
    text: str


def commented_keys(function: Callable[..., object]) -> dict[str, str]:
    """Return dotted key -> comment after its default, from a function that builds a tree.

    The function assigns dictionaries, or ``CfgNode``s of them, and single values to ``cfg`` and its
    attributes; every key is on a line of its own, followed by its comment.
    """
    source = textwrap.dedent(inspect.getsource(function))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    return {
        key: " ".join(comments[line] for line in lines if line in comments)
        for statement in ast.walk(ast.parse(source))
        if isinstance(statement, ast.Assign)
        for target in [ast.unparse(statement.targets[0])]
        if target.split(".")[0] == "cfg"
        for key, lines in _leaves(target.partition(".")[2], statement.value, statement.lineno)
    }


def _leaves(key: str, value: ast.expr, line: int) -> Iterator[tuple[str, range]]:
    """Yield each dotted key with the range of lines that its value spans."""
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.Dict):
        value = value.args[0]
    if not isinstance(value, ast.Dict):
        if key:
            yield key, range(line, (value.end_lineno or line) + 1)
        return
    for name, item in zip(value.keys, value.values):
        assert isinstance(name, ast.Constant)
        yield from _leaves(f"{key}.{name.value!s}".lstrip("."), item, name.lineno)


def loss_keys(
    name: str, defaults: Callable[[str], Mapping[str, object]] = section_defaults
) -> Iterator[Key]:
    """The keys of a loss's section, explained by its docstrings."""
    _, texts = losses.described(name)
    for key, default in defaults(name).items():
        yield Key(f"DISTILL.{name}.{key}", default, texts[key.lower()])


def all_losses(defaults: Callable[[str], Mapping[str, object]] = section_defaults) -> str:
    """Every loss with its keys, as text."""
    blocks = []
    for name in losses.names():
        about, _ = losses.described(name)
        heading = about if about.upper().startswith(f"{name}:") else f"{name}: {about}"
        blocks.append("\n".join([heading, *map(shown, loss_keys(name, defaults))]))
    return "\n\n".join(blocks)


def shown_default(key: Key) -> str:
    """A default as written on the command line."""
    if key.default == "":
        return "''"
    return str(dict(key.default) if isinstance(key.default, Mapping) else key.default)


def shown(key: Key) -> str:
    """A key as text, wrapped over several lines if long."""
    head = f"  {f'{key.name} {shown_default(key)}':44s} "
    further = " " * 47
    return textwrap.fill(key.text, WIDTH, initial_indent=head, subsequent_indent=further)
