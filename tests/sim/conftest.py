"""The command line as a test calls it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sim.cli import main


@pytest.fixture(scope="session", autouse=True)
def one_spin() -> Iterator[None]:
    """Commands that tell a rate in spins measure one at each call, for seconds; here a process measures it once."""
    import sim.bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim.bench, "spin", functools.cache(sim.bench.spin))
        yield


@pytest.fixture
def kvproof(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line in an empty folder; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call
