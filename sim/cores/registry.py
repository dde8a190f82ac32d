"""Which serving cores there are, by name: ours, and those that other packages add (entry points `kvproof.cores`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final, cast

from sim.cores.protocol import CoreConfig, ServingCore

GROUP: Final = "kvproof.cores"
BUILT_IN: Final = {"paged_attention": "sim.cores.paged_attention:build"}
"""Found without an installed distribution, too."""

CoreFactory = Callable[[CoreConfig], ServingCore]


class UnknownCoreError(Exception):
    """No core has that name; the message lists those that there are."""


@functools.cache
def core_names() -> dict[str, str]:
    """Name to "module:function" of every core; looked up once in a process."""
    return {**BUILT_IN, **{entry.name: entry.value for entry in entry_points(group=GROUP)}}


def core_factory(name: str) -> CoreFactory:
    """The function that builds the core. UnknownCoreError: there is none, or its module is not there."""
    names = core_names()
    if name not in names:
        raise UnknownCoreError(f"core.kind: there is no core '{name}'; there are: {', '.join(sorted(names))}")
    module, _, attribute = names[name].partition(":")
    try:
        return cast("CoreFactory", getattr(import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise UnknownCoreError(f"core.kind: '{name}' is registered as {names[name]}, but: {error}") from error
