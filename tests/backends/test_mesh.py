"""Heads sharded over devices and over processes: the same bits as on one device, and no device waits for another."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.scenario import dump_scenario
from tests.backends.test_agreement import ROOT, mesh_run
from tests.sim.scenario_parts import small

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "road"), [("reader", "native"), ("reader", "rows"), ("tiny", "native")])
def test_runs_on_1_2_and_8_devices_have_the_same_trace_and_the_same_words_in_every_page(model, road, tmp_path):
    path = tmp_path / "run.yaml"
    sizes = {"cache__kv_heads": 8, "cache__num_pages": 13, "cache__layers": 2, "workload__num_requests": 12}
    kind = {"kind": model, "vocab_size": 64}
    dump_scenario(small(backend__kind="jax", workload__arrivals__request_rate=1e6, model=kind, **sizes), path)
    printed = mesh_run(f"""
from sim.run import run
from sim.scenario import load_scenario
for mesh in ("{{}}", "{{heads: 2}}", "{{heads: 8}}"):
    report = run(load_scenario({str(path)!r}, [f"backend.mesh={{mesh}}", "backend.road={road}"]))
    summary = report.summary
    print(summary["verdict"], report.trace_hash, summary["cache_hash"], summary["num_preemptions"] > 0)
""").splitlines()
    assert len(printed) == 3
    assert len(set(printed)) == 1
    verdict, _, cache_hash, preempted = printed[0].split()
    assert (verdict, preempted) == ("held", "True")
    assert len(cache_hash) == 16


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_no_program_that_writes_makes_devices_talk_to_each_other(devices):
    """The compiled text of every program that a run used, of the model that writes and reads nothing."""
    printed = mesh_run(f"""
import json
import numpy as np
from backends.jax_programs import Programs
from backends.protocol import ModelSpec
texts, made = {{}}, Programs._program

def recorded(self, key, body, **options):
    program = made(self, key, body, **options)
    def call(*args):
        if str(key) not in texts:
            texts[str(key)] = program.lower(*args).compile().as_text()
        return program(*args)
    if options.get("donate_argnums"):
        self._made[key] = call
        return call
    return program

Programs._program = recorded
for road in ("auto", "rows"):
    cache = cache_spec(kv_heads=8)
    backend = opened(JaxBackend(road), cache, ModelSpec("echo"), DeviceSpec(mesh={{"heads": {devices}}}))
    run = EngineRun(cache, 3, 1)
    run.run(lambda plan, rows: backend.execute(plan, rows).result())
    backend.poison(np.array([1], np.int32), "big")
    backend.close()
names = {COLLECTIVES!r}
found = {{key: [name for name in names if name in text] for key, text in texts.items()}}
whole = [key for key, text in texts.items() if "num_partitions={devices}" not in text.splitlines()[0]]
print(json.dumps([found, whole]))
""")
    found, whole = json.loads(printed)
    assert len(found) >= 6
    assert whole == []
    assert {key: names for key, names in found.items() if names} == {}


@pytest.mark.slow
def test_a_program_that_gathers_all_heads_shows_its_collective():
    """What the test above looks for stands in the text of a program that has it."""
    printed = mesh_run(f"""
import numpy as np
cache = cache_spec(kv_heads=8)
backend = opened(JaxBackend(), cache, devices=DeviceSpec(mesh={{"heads": 8}}))
program = backend._programs.place_words(16)
text = program.lower(backend._pools, *np.zeros((2, 16), np.int32)).compile().as_text()
print("num_partitions=8" in text.splitlines()[0], [name for name in {COLLECTIVES!r} if name in text])
""")
    assert printed == "True ['all-gather']\n"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(commands) -> list[str]:
    """Start all commands at once; what each printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [subprocess.Popen(command, **pipes, env=environment) for command in commands]
    try:
        ended = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), ended[0][1][-2000:]
    return [out for out, _ in ended]


def words(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_two_processes_with_two_devices_each_write_the_same_words_as_one_process_with_one(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir(), shared.mkdir()
    member = [sys.executable, "-m", "tests.backends.mesh_member"]
    coordinator = f"127.0.0.1:{free_port()}"
    (printed,) = together([[*member, "0", "1", "1", "-", str(alone)]])
    assert printed.split()[0] == "1"
    both = together([[*member, str(nth), "2", "4", coordinator, str(shared)] for nth in range(2)])
    assert [out.splitlines()[-1] for out in both] == [f"2 {printed.split()[1]}"] * 2
    whole, parts = words(alone), words(shared)
    assert len(whole) == 8  # K and V of two layers, on two roads
    assert len(parts) == 4 * len(whole)
    for name, pool in whole.items():
        stem = name.rsplit("-", 1)[0]
        joined = np.concatenate([parts[f"{stem}-{head}"] for head in range(4)])
        assert pool.any()
        assert np.array_equal(joined, pool), name


@pytest.mark.slow
def test_two_processes_run_one_scenario_and_each_tells_the_same_verdict_and_hashes(tmp_path):
    path = tmp_path / "run.yaml"
    dump_scenario(small(backend__kind="jax", backend__mesh={"heads": 2}, workload__num_requests=4), path)
    kvproof = [sys.executable, "-m", "sim.cli", "run", str(path), "--json", "--quiet", "--no-plots"]
    share = ["--coordinator", f"127.0.0.1:{free_port()}"]
    both = together([[*kvproof, "--out", str(tmp_path / n), "--process", f"{n}/2", *share] for n in "01"])
    (alone,) = together([[*kvproof, "--set", "backend.mesh={}", "--out", str(tmp_path / "alone")]])
    summaries = [json.loads(out) for out in (*both, alone)]
    assert [summary["device"]["processes"] for summary in summaries] == ["2", "2", "1"]
    assert len({(s["verdict"], s["trace_hash"], s["cache_hash"]) for s in summaries}) == 1
    assert summaries[0]["verdict"] == "held"
