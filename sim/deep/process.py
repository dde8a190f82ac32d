"""A run in a process of its own: `python -m sim.deep.process SCENARIO` prints its rolling hashes as JSON."""

from __future__ import annotations

import json
import sys

from sim.deep.check import base_of
from sim.mutants import find_mutant, planted
from sim.scenario import load_scenario


def main(path: str) -> int:
    """Play the scenario; 0, and the hashes on stdout."""
    scenario = load_scenario(path)
    mutant = find_mutant(scenario.plant) if scenario.plant else None
    with planted(mutant):
        _, tape = base_of(scenario, mutant)
    said = {"digests": tape.digests.hex(), "trace_hash": tape.trace_hash, "crash": tape.crash}
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
