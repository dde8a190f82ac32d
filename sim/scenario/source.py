"""A scenario file as plain data, with the line and column of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from sim.scenario.errors import ScenarioError

KeyPath = tuple[str | int, ...]
MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML 1.2 forbids in a file (section 5.1)."""


@dataclass(slots=True)
class Source:
    """What a file and its overrides say, and where; lines and columns count from 1."""

    name: str
    data: dict[str, Any]
    places: dict[KeyPath, tuple[int, int]]
    overrides: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])
    """The command-line flag that set each key."""

    def place(self, path: KeyPath) -> tuple[int, int]:
        """Line and column of a key, or of the nearest key around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, (1, 1))

    def flag(self, path: KeyPath) -> str | None:
        """The override that set a key or a mapping around it, if one did."""
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((self.overrides[prefix] for prefix in prefixes if prefix in self.overrides), None)

    def problem(self, path: KeyPath, what: str) -> str:
        """The line that a user reads: where, which key, what is wrong."""
        line, column = self.place(path)
        where = self.flag(path) or f"{self.name}:{line}:{column}"
        return f"{where}: {dotted(path)}: {what}" if path else f"{where}: {what}"


def yaml_engine(kind: Literal["rt", "safe"]) -> Any:
    """A pure Python YAML 1.2 reader and writer: rt keeps places, safe makes builtin types."""
    return YAML(typ=kind, pure=True)


def dotted(path: KeyPath) -> str:
    """A key path as users write it."""
    return ".".join(map(str, path))


def read_source(path: Path, what: str = "scenario") -> Source:
    """Read a YAML 1.2 file; ScenarioError: it is missing, unreadable, no text, no YAML or no mapping.

    `what` it should be stands in the error.
    """
    name = str(path)
    text = _text(path, what)
    try:
        data = yaml_engine("rt").load(StringIO(text))
        values = iter(range(MAX_VALUES))
        places: dict[KeyPath, tuple[int, int]] = {}
        plain = _plain(data, (), places, values)
    except MarkedYAMLError as error:
        _refuse_yaml(name, error)
    except ReaderError:
        raise ScenarioError([f"{name}:{_unprintable_line(text)}:1: not YAML: a control character"]) from None
    except RecursionError:
        raise ScenarioError([f"{name}:1:1: nested too deeply"]) from None
    except YAMLError as error:
        raise ScenarioError([f"{name}:1:1: not YAML: {error}"]) from None
    except StopIteration:
        raise ScenarioError([f"{name}:1:1: more than {MAX_VALUES} values, aliases counted each time"]) from None
    if plain is None:
        raise ScenarioError([f"{name}:1:1: the file is empty: expected a {what}"])
    if not isinstance(plain, dict):
        raise ScenarioError([f"{name}:1:1: expected a mapping of keys, found {found(plain)}"])
    return Source(name, cast("dict[str, Any]", plain), places)


def _text(path: Path, what: str) -> str:
    name = str(path)
    if path.is_dir():
        raise ScenarioError([f"{name}: is a directory: expected a {what} file"])
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.yaml")), n=1)
        hint = f" (did you mean '{path.parent / near[0]}'?)" if near else ""
        raise ScenarioError([f"{name}: no such file{hint}"]) from None
    except OSError as error:
        raise ScenarioError([f"{name}: cannot read the file: {error.strerror or error}"]) from None
    if len(raw) > MAX_BYTES:
        raise ScenarioError([f"{name}: {len(raw)} bytes, but a {what} has at most {MAX_BYTES}; traces are files apart"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ScenarioError([f"{name}:{line}:{column}: not UTF-8 text: {error.reason}"]) from None


def _unprintable_line(text: str) -> int:
    lines = text.split("\n")
    return next((number for number, line in enumerate(lines, 1) if _UNPRINTABLE.search(line)), 1)


def _refuse_yaml(name: str, error: Any) -> NoReturn:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
    what = " ".join(str(error.problem or error.context or "not YAML").split())
    if isinstance(error, DuplicateKeyError):
        key = what.removeprefix('found duplicate key "').partition('"')[0]
        raise ScenarioError([f"{where}: {key}: the key stands here a second time"]) from None
    if what.startswith("but "):
        what = f"{error.context} {what}"
    if "'\\t'" in what:
        what = "a tab; YAML indents with spaces"
    raise ScenarioError([f"{where}: not YAML: {what}"]) from None


def _plain(node: object, path: KeyPath, places: dict[KeyPath, tuple[int, int]], values: Iterator[int]) -> object:
    """Builtin types throughout; notes where each key stands. StopIteration: too many values."""
    next(values)
    if isinstance(node, CommentedMap):
        plain: dict[object, object] = {}
        for key, value in cast("Mapping[object, object]", node).items():
            here = (*path, key if isinstance(key, str) else str(key))
            _note(places, here, node, key)
            plain[_scalar(key)] = _plain(value, here, places, values)
        return plain
    if isinstance(node, CommentedSeq):
        items: list[object] = []
        for index, value in enumerate(cast("Sequence[object]", node)):
            here = (*path, index)
            _note(places, here, node, index)
            items.append(_plain(value, here, places, values))
        return items
    return _scalar(node)


def _note(
    places: dict[KeyPath, tuple[int, int]], path: KeyPath, node: CommentedMap | CommentedSeq, key: object
) -> None:
    """Merged keys (<<) have no place of their own; the mapping around them stands in."""
    spots = cast("Mapping[object, list[int]]", cast("Any", node).lc.data or {})
    if key in spots:
        line, column = spots[key][:2]
        places[path] = (line + 1, column + 1)


def _scalar(value: object) -> object:
    """The YAML library's own scalar classes as builtin ones."""
    for builtin in (bool, int, float, str):
        if isinstance(value, builtin):
            return builtin(value)
    return value


def found(value: object) -> str:
    """A value as an error shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
