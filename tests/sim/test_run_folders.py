"""What `kvproof run` leaves in its folder, and which folders it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.cli import main
from sim.scenario import dump_scenario
from tests.sim.run_parts import planned_only


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    dump_scenario(planned_only(workload__num_requests=5), path)
    return path


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_a_folder_in_use_is_refused_and_equal_names_get_folders_of_their_own(
    scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert status_of("run", scenario, scenario, "--out", out, "--no-plots", "-q") == 0
    assert sorted(path.name for path in out.iterdir()) == ["small", "small-2"]
    assert status_of("run", scenario, "--out", out / "small", "--no-plots") == 2
    assert "is not empty; give a new folder" in " ".join(capsys.readouterr().err.split())


def test_a_run_draws_every_plot_as_png_and_svg(scenario: Path, tmp_path: Path) -> None:
    assert status_of("run", scenario, "--out", tmp_path / "out", "-q") == 0
    drawn = list((tmp_path / "out" / "plots").iterdir())
    assert {path.suffix for path in drawn} == {".png", ".svg"}
    assert len({path.stem for path in drawn}) * 2 == len(drawn) > 0
