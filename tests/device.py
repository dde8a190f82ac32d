"""The device that the device suite runs on: `pytest -m device --platform gpu` (tests/conftest.py)."""

import os

from backends.protocol import DeviceSpec

PLATFORM = os.environ.get("KVPROOF_TEST_PLATFORM", "cpu")
ONE_DEVICE = DeviceSpec(PLATFORM)
