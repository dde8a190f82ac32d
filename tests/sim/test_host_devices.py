"""A sharded run in a process of its own: its exit status, and a Ctrl-C of the process that waits for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sim import host_devices
from sim.host_devices import run_with_devices
from sim.scenario import dump_scenario
from tests.sim.run_parts import planned_only

PARENT = """
import sys
from sim.host_devices import run_with_devices
output, status = run_with_devices(2, sys.argv[1:])
sys.stdout.write(output)
sys.exit(status)
"""


def test_a_ctrl_c_of_the_parent_ends_the_child_with_its_record(tmp_path: Path) -> None:
    path, log, out = tmp_path / "long.yaml", tmp_path / "log.jsonl", tmp_path / "run"
    dump_scenario(planned_only(workload__num_requests=500_000), path)
    arguments = ["run", path, "--no-plots", "--quiet", "--json", "--out", out, "--plan-log", log]
    parent = [sys.executable, "-c", PARENT, *map(str, arguments)]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, err = process.communicate()
    assert process.returncode == 130
    assert json.loads(output)["verdict"] == "interrupted"
    assert json.loads((out / "summary.json").read_text())["verdict"] == "interrupted"
    assert "Traceback" not in err


class Ended:
    """A child that ends as told."""

    code = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.returncode = self.code

    def __enter__(self) -> Ended:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def communicate(self) -> tuple[str, None]:
        return "", None


@pytest.mark.parametrize(("code", "status"), [(0, 0), (4, 4), (-signal.SIGINT, 130)])
def test_the_status_is_the_childs(code: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ended, "code", code)
    monkeypatch.setattr(host_devices.subprocess, "Popen", Ended)
    assert run_with_devices(2, []) == ("", status)


def test_a_killed_child_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ended, "code", -signal.SIGKILL)
    monkeypatch.setattr(host_devices.subprocess, "Popen", Ended)
    with pytest.raises(RuntimeError, match="ended by SIGKILL"):
        run_with_devices(2, [])
