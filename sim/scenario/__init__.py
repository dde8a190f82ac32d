"""Scenarios: the YAML files that say everything about a run, loaded into one frozen value."""

from sim.scenario.models import Scenario

__all__ = ["Scenario"]
