"""Which serving cores there are, by name: ours, and those that other packages add (entry points `kvproof.cores`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Final

from backends.loading import load_function
from sim.cores.checked import CheckedFactory
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
    """The function that builds the core: that of a registered name, or the one that "module:function" names.

    Cores that are not ours are checked for the form of what they answer (`sim.cores.checked`).

    UnknownCoreError: there is none, or its module is not there.
    """
    names = core_names()
    if ":" not in name and name not in names:
        raise UnknownCoreError(
            f"core.kind: there is no core '{name}'; give 'module:function', or one of {', '.join(sorted(names))}"
        )
    path = names.get(name, name)
    try:
        factory = load_function(path)
    except ValueError as error:
        raise UnknownCoreError(f"core.kind: {error}") from error
    return factory if path in BUILT_IN.values() else CheckedFactory(factory, path)
