"""Loads code under test by name: a write kernel or a core that lies beside its scenario or in a package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; the working folder comes first.

    ValueError: it cannot be imported, or is no function.
    """
    module, _, function = name.partition(":")
    # Code under test lies beside its scenario more often than in an installed package.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be loaded (expected 'module:function'): {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ValueError(f"{name!r} is no function: found {type(found).__name__}")
    return found
