"""Deep checks: statements about a scenario that only a second run, or a fork of the core, can judge.

scenario --> world --> base run --> tape
               |                      |  compared: tokens, ends, times, hashes, plans, bits
               +--> changed world --> tape
"""

from sim.deep.check import RELATIONS, DeepResult, Relation, deep_check, judge_deep

__all__ = ["RELATIONS", "DeepResult", "Relation", "deep_check", "judge_deep"]
