"""Keeps compiled programs on disk between runs: compiling costs a fresh process more than a short run does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax

OPT_OUT = "KVPROOF_NO_COMPILATION_CACHE"
"""Set (to anything but nothing) in the environment, it keeps kvproof from touching JAX's compilation cache."""
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Have JAX keep compiled programs in the user's cache directory; return that, or None where nothing was changed.

    The directory is kvproof/xla under XDG_CACHE_HOME (~/.cache). A directory that JAX has been given already stays, and
    JAX then also keeps programs that took less than a second to compile, which all of these do. Where the directory
    cannot be written, or `OPT_OUT` is set, each process compiles for itself.
    """
    if environment.get(OPT_OUT):
        return None
    given = cast("str | None", getattr(jax.config, "jax_compilation_cache_dir", None)) or environment.get(_FOLDER)
    if given is None:
        folder = _writable(environment)
        if folder is None:
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
        given = str(folder)
    if _MIN_SECONDS not in environment:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(given)


def _writable(environment: Mapping[str, str]) -> Path | None:
    try:
        above = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = above / "kvproof" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
