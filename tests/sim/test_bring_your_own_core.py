"""The page docs/bring-your-own-core.md, followed line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sim.page_parts import ROOT, Command, files_and_commands, follow, reader_environment

FILES, COMMANDS = files_and_commands(ROOT / "docs" / "bring-your-own-core.md")
ON_JAX = [command for command in COMMANDS if "backend.kind=jax" in command.line]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, dict[str, str]]]:
    """The working folder, with the files of the page, and the environment of commands."""
    environment = reader_environment(tmp_path)
    folder = tmp_path / "reader"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    yield folder, environment
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_page_names_its_files_and_shows_what_each_kind_of_command_prints() -> None:
    assert list(FILES) == ["my_core.py", "first.yaml", "test_my_core.py"]
    typed = {command.line.split()[1] for command in COMMANDS if command.line.startswith("kvproof")}
    assert typed == {"run", "fuzz", "explore", "replay", "explain"}
    assert len(ON_JAX) == 1
    assert not [command.line for command in COMMANDS if not command.shown and not command.line.startswith("sed")]


def test_a_reader_of_the_page_sees_what_it_shows(reader: tuple[Path, dict[str, str]]) -> None:
    for command in COMMANDS:
        if command not in ON_JAX:
            follow(command, *reader)


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_JAX, ids=lambda command: command.line)
def test_a_reader_of_the_page_sees_what_it_shows_of_jax(command: Command, reader: tuple[Path, dict[str, str]]) -> None:
    follow(command, *reader)


def test_the_core_of_the_page_knows_nothing_of_our_scheduler() -> None:
    imported = [line for line in FILES["my_core.py"].splitlines() if line.startswith(("import ", "from "))]
    ours = [line for line in imported if "paged_attention" in line or "sim" in line]
    assert [line.split()[1] for line in ours] == ["paged_attention.plan"]
