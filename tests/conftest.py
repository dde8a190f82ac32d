"""Settings that every test shares; they must stand before JAX starts."""

import os
import signal

import pytest
from hypothesis import settings

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--platform", choices=("cpu", "gpu", "tpu"), default="cpu", help="What `-m device` runs on.")


def pytest_configure(config: pytest.Config) -> None:
    platform = config.getoption("--platform")
    os.environ["KVPROOF_TEST_PLATFORM"] = platform
    if platform == "cpu":
        # Tests compile many small programs and run each a few times: compiling is what costs.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()
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
