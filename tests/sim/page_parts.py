"""A page of the documentation as its reader follows it: files to write, commands to type, what they print."""

from __future__ import annotations

import io
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sim.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`([\w.]+\.(?:py|yaml))`[:,]?[^`]*\Z")
STATUS = re.compile(r"# exit status (\d+)$")


@dataclass
class Command:
    """A line to type and what the page shows below it."""

    line: str
    shown: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status that it must have."""
        found = STATUS.search(self.line)
        return int(found[1]) if found else 0


def files_and_commands(page: Path) -> tuple[dict[str, str], list[Command]]:
    """The files of the page by name (the last one named before their block), and its commands in order."""
    text = page.read_text(encoding="utf-8")
    files: dict[str, str] = {}
    commands: list[Command] = []
    for block in BLOCK.finditer(text):
        if block["kind"] == "console":
            for line in block["text"].splitlines():
                if line.startswith("$ "):
                    commands.append(Command(line[2:]))
                else:
                    commands[-1].shown.append(line)
        else:
            named = FILE.search(text[: block.start()])
            assert named, f"no file is named before the block at {block.start()}"
            files[named[1]] = block["text"]
    return files, commands


def reader_environment(folder: Path) -> dict[str, str]:
    """`kvproof` and `pytest` on the path, with the entry points of pyproject.toml, whatever is installed."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name, module in (("kvproof", "sim.cli"), ("pytest", "pytest")):
        script = binaries / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info = folder / "path" / "kvproof_reader-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvproof-reader\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    path = os.pathsep.join((str(ROOT), str(folder / "path")))
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "NO_COLOR": "1",
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
    }


def follow(command: Command, folder: Path, environment: dict[str, str]) -> None:
    """Type a command in `folder`, the working folder; AssertionError: it ends or prints otherwise than the page shows.

    What needs no process of its own (all but a replay, pytest and the tools of a shell) runs in this one: starting
    Python costs more than the commands do.
    """
    words = shlex.split(command.line, comments=True)
    in_process = words[0] == "kvproof" and words[1] != "replay"
    status, text = _called(words[1:]) if in_process else _typed(command.line, folder, environment)
    printed = text.splitlines()
    assert status == command.status, f"$ {command.line}\n{text}"
    at = 0
    for line in command.shown:
        if line == "…":
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("…")))
        while at < len(printed) and not pattern.fullmatch(printed[at]):
            at += 1
        assert at < len(printed), f"$ {command.line}\nthe page shows: {line}\nbut what is printed is:\n{text}"
        at += 1


def _typed(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _called(arguments: list[str]) -> tuple[int, str]:
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0), text.getvalue()
