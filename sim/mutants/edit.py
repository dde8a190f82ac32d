"""Puts a planted bug into the code under test, in this process and for a while: a function's code is rewritten.

    Edit(target, old, new) --source text with `old` replaced--> compiled --> the function's `__code__`

The function object stays the same, so that everybody who imported it runs the bug; no file is touched. What was
compiled, cached or traced from the old code is thrown away on the way in and on the way out.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement in the source text of one function.

    `target` is "module:function" or "module:Class.method"; `old` stands exactly once in its source text.
    """

    target: str
    old: str
    new: str


class StaleEditError(Exception):
    """The code has moved on: an edit's target or text is not there (any more); the message says which."""


@contextmanager
def applied(edits: Iterable[Edit]) -> Generator[None]:
    """Run the body with the edits in force. StaleEditError: one of them fits no code; nothing is changed then.

    Edits that are in force already are left alone, with everything that was compiled from them.
    """
    rewritten = [(found, code) for found, code in fitted(edits) if _function(found).__code__ != code]
    with ExitStack() as stack:
        if rewritten:
            _forget_compiled()
            stack.callback(_forget_compiled)
        for found, code in rewritten:
            stack.enter_context(_swapped(found, code))
        yield


def fitted(edits: Iterable[Edit]) -> list[tuple[Any, CodeType]]:
    """What is rewritten and its new code, nothing changed yet. StaleEditError: an edit fits no code."""
    by_target: dict[str, list[Edit]] = {}
    for edit in edits:
        by_target.setdefault(edit.target, []).append(edit)
    return [(_find(target), _rewrite(target, group)) for target, group in by_target.items()]


@contextmanager
def _swapped(found: Any, code: CodeType) -> Generator[None]:
    function = _function(found)
    before = function.__code__
    function.__code__ = code
    _clear(found)
    try:
        yield
    finally:
        function.__code__ = before
        _clear(found)


def _find(target: str) -> Any:
    """The attribute that `target` names, as it stands in its class or module: not bound, not called."""
    module_name, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = inspect.getattr_static(found, name)
    except (ImportError, AttributeError) as error:
        raise StaleEditError(f"{target}: there is no such function ({error})") from None
    return found


def _function(found: Any) -> FunctionType:
    """The plain function behind a property, class method, static method, cache or other wrapper."""
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, classmethod | staticmethod):
        found = cast("Any", found).__func__
    function: Any = inspect.unwrap(found)
    if not isinstance(function, FunctionType):
        raise StaleEditError(f"{found!r} is no Python function, so that it cannot be edited")
    return function


def _rewrite(target: str, edits: list[Edit]) -> CodeType:
    function = _function(_find(target))
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        count = source.count(edit.old)
        if count != 1:
            raise StaleEditError(f"{target}: {edit.old!r} stands {count} times in its source, expected once")
        source = source.replace(edit.old, edit.new)
    tree = ast.parse(source)
    # At its own lines of the file, so that the source of edited code is found again, by tracebacks and by edits.
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    # A frame around it that has the same free variables (`__class__` of super(), say) gives the code the same cells.
    free = function.__code__.co_freevars
    outer = ast.parse(f"def _around({', '.join(free)}): pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [definition]
    module = ast.fix_missing_locations(ast.Module([outer], type_ignores=[]))
    flags = function.__code__.co_flags & _FUTURE_FLAGS
    compiled = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    code = _nested(_nested(compiled, "_around"), definition.name)
    if code.co_freevars != free:
        raise StaleEditError(f"{target}: the edit changes its free variables from {free} to {code.co_freevars}")
    return code


def _future_flags() -> int:
    import __future__

    return int(__future__.annotations.compiler_flag)


_FUTURE_FLAGS = _future_flags()


def _nested(code: CodeType, name: str) -> CodeType:
    return next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)


def _clear(found: Any) -> None:
    if hasattr(found, "cache_clear"):
        found.cache_clear()


def _forget_compiled() -> None:
    """Drop what JAX and the backend traced, where JAX has been imported at all."""
    if "jax" not in sys.modules:
        return
    for module, name in (("backends.jax_programs", "programs_for"), ("paged_attention.model_io", "_compiled_merge")):
        if module in sys.modules:
            _clear(getattr(sys.modules[module], name))
    sys.modules["jax"].clear_caches()
