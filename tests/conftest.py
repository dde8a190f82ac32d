"""Settings that every test shares; they must stand before JAX starts."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import xdist.scheduler
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from hypothesis import settings

# Types, dtypes and numbers of axes of the host side are checked at run time, in tests only. The frame that jaxtyping
# puts around each call, and in which axes of several arrays are compared, takes longer than the simulator itself.
CHECKED = (
    *("paged_attention.fingerprint", "paged_attention.rows", "paged_attention.slots", "paged_attention.planning"),
    *("paged_attention.sequences", "paged_attention.pages", "paged_attention.engine", "paged_attention.books"),
    *("paged_attention.scheduler", "paged_attention.layout", "backends.scripted", "backends.none"),
    *("backends.numpy_oracle", "sim.record", "sim.script", "sim.trace_hash"),
)
assert not sys.modules.keys() & set(CHECKED), "a module that is imported already would go unchecked"
beartype_packages(CHECKED, conf=BeartypeConf(claw_is_pep526=False))

# Python compiles jax anew in each process where it may keep no bytecode, and the suite starts some dozens.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Of modules that earlier runs wrote and imported.
    for folder in Path(sys.pycache_prefix + tempfile.gettempdir()).glob("pytest-of-*"):
        shutil.rmtree(folder, ignore_errors=True)


class FilesTogether(xdist.scheduler.LoadFileScheduling):
    """Each file's tests go to one worker, those of tests/backends to the same: they share compiled programs."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/backends" if nodeid.startswith("tests/backends/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--platform", choices=("cpu", "gpu", "tpu"), default="cpu", help="What `-m device` runs on.")


def pytest_configure(config: pytest.Config) -> None:
    platform = config.getoption("--platform")
    os.environ["KVPROOF_TEST_PLATFORM"] = platform
    if platform == "cpu":
        # Tests compile many small programs and run each a few times: compiling is what costs.
        from sim.host_devices import compile_quickly

        compile_quickly()
        return
    # Several processes of the suite share the device, which JAX would take whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    try:
        jax.devices(platform)
    except RuntimeError as error:
        raise pytest.UsageError(f"--platform {platform}: JAX {jax.__version__} finds none here: {error}") from error


# Tests leave nothing in the user's cache directory.
os.environ["KVPROOF_NO_COMPILATION_CACHE"] = "1"

# Shared machines stall; a deadline would say more about them than about the code.
settings.register_profile("kvproof", deadline=None)
settings.load_profile("kvproof")

# A shell that starts the tests in the background lets them and their children ignore Ctrl-C, which some of them test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
