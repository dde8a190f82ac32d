"""The page on write kernels, executed: its example holds, and its bug is caught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sim.run import run
from tests.sim.scenario_parts import small

EXAMPLE = re.search(r"```python\n(.*?)```", Path("docs/protocol.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["heads_first", "pages_first"])
@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        ("position % size)", False),
        ("(position + 1) % size)", True),
        ("(position ^ 1) % size)", True),
    ],
)
def test_the_documented_write_kernel_holds_and_one_place_too_far_is_caught(
    wrong: str, caught: bool, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EXAMPLE is not None
    module = f"kernel_{len(wrong)}_{layout}_{caught}"
    (tmp_path / f"{module}.py").write_text(EXAMPLE.group(1).replace("position % size)", wrong))
    monkeypatch.chdir(tmp_path)
    report = run(
        small(backend__kind="jax", backend__writer=f"{module}:write", cache__layout=layout, workload__num_requests=6)
    )
    assert ("K1" in {violation.id for violation in report.violations}) == caught
    assert bool(report.violations) == caught
