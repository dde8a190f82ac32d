"""Scenarios: the YAML files that say everything about a run, loaded into one frozen value."""

from sim.scenario.errors import ScenarioError
from sim.scenario.loader import (
    dump_scenario,
    json_schema,
    load_scenario,
    scenario_hash,
    scenario_text,
    schema_text,
)
from sim.scenario.models import Scenario

__all__ = [
    "Scenario",
    "ScenarioError",
    "dump_scenario",
    "json_schema",
    "load_scenario",
    "scenario_hash",
    "scenario_text",
    "schema_text",
]
