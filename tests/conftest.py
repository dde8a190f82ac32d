"""Settings that every test shares; they must stand before JAX starts."""

import os
import signal

from hypothesis import settings

# Tests compile many small programs and run each a few times: compiling is what costs.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()

# Tests leave nothing in the user's cache directory.
os.environ["KVPROOF_NO_COMPILATION_CACHE"] = "1"

# Shared machines stall; a deadline would say more about them than about the code.
settings.register_profile("kvproof", deadline=None)
settings.load_profile("kvproof")

# A shell that starts the tests in the background lets them and their children ignore Ctrl-C, which some of them test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
