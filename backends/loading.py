"""Loads code under test by name: a write kernel or a core that lies beside its scenario or in a package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; the working folder comes first.

    ValueError: it cannot be imported, or is no function; the message says what to look at.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{name!r} cannot be loaded: expected 'module:function', such as 'my_module:build'")
    found = getattr(_module(name, module), function, None)
    if found is None:
        raise ValueError(f"{name!r} cannot be loaded: {_near(sys.modules[module], function)}")
    if not callable(found):
        raise ValueError(f"{name!r} is no function: found {type(found).__name__}")
    return found


def _module(name: str, module: str) -> ModuleType:
    if module in sys.modules:
        return sys.modules[module]
    # Code under test lies beside its scenario more often than in an installed package.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in {module, module.partition(".")[0]}:
            raise ValueError(f"{name!r} cannot be loaded: it imports {error.name!r}, which is not installed") from error
        raise ValueError(
            f"{name!r} cannot be loaded: there is no {module.replace('.', '/')}.py in the working folder, and no"
            f" installed package {module!r}"
        ) from error
    except Exception as error:
        raise ValueError(f"{name!r} cannot be loaded: its import raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _near(module: ModuleType, function: str) -> str:
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    meant = get_close_matches(function, own, 1)
    hint = f"; did you mean '{meant[0]}'?" if meant else ""
    file = Path(module.__file__ or module.__name__)
    name = f"{file.parent.name}/{file.name}" if file.name == "__init__.py" else file.name
    return f"{name} has no function '{function}'{hint}"
