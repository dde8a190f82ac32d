"""Which devices JAX finds on this machine, for people who ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax


def present_devices() -> list[dict[str, Any]]:
    """Platform, id and kind of every device, the CPU's included. RuntimeError: JAX cannot start an asked platform."""
    ask = cast("Callable[..., list[Any]]", jax.devices)  # pyright: ignore[reportUnknownMemberType]
    devices = ask() + ask("cpu")
    found = {(device.platform, device.id): device for device in devices}
    return [{"platform": device.platform, "id": device.id, "kind": device.device_kind} for device in found.values()]
