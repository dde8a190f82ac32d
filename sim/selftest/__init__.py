"""Proves that the judge is awake: every planted bug against the invariants, every legal variant against false alarms.

mutants --drivers--> which invariant fires first, after how many steps, the same again?
kill matrix --only=[id]--> is each invariant the sole killer of at least one mutant?
benign variants, scenario library --> false alarms, vacuous invariants
"""

from sim.selftest.campaign import Selftest, SelftestOptions, selftest

__all__ = ["Selftest", "SelftestOptions", "selftest"]
