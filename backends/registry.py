"""Finds backends by name through the entry point group `kvproof.backends`; any installed package may add one."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from backends.protocol import Backend, BackendUnavailableError

GROUP = "kvproof.backends"


@functools.cache
def backend_entry_points() -> dict[str, EntryPoint]:
    """Every installed backend's entry point, by name, in alphabetical order; nothing is imported.

    Looked up once in a process: it reads the metadata of every installed package.
    """
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def make_backend(name: str) -> Backend:
    """A new backend, not opened yet. BackendUnavailableError: none of that name, or its own imports fail."""
    present = backend_entry_points()
    if name not in present:
        raise BackendUnavailableError(
            f"no backend is named {name!r}; installed are {', '.join(present) or 'none'} "
            f"(a package adds one through the entry point group {GROUP!r})"
        )
    try:
        factory = present[name].load()
    except ImportError as error:
        others = ", ".join(other for other in present if other != name)
        raise BackendUnavailableError(
            f"the backend {name!r} ({present[name].value}) cannot be imported: {error}; others installed: {others}"
        ) from error
    return cast("Backend", factory())
