"""The command line: `kvproof`. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sim.exit_codes import ExitCode

if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status; users see sentences, tracebacks only with KVPROOF_DEBUG=1."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    # Even the command line's own imports take long enough for a Ctrl-C: they are inside the try.
    try:
        with _term_as_ctrl_c():
            _app()(args=arguments, prog_name="kvproof")
    except SystemExit as end:
        if _of_interrupt(end):
            _say("interrupted")
        return end.code if isinstance(end.code, int) else ExitCode.HELD
    except KeyboardInterrupt:
        _say("interrupted")
        return ExitCode.INTERRUPTED
    except Exception as error:
        return _failed(error)
    return ExitCode.HELD


def _app() -> typer.Typer:
    import typer

    from sim.cli import (
        audit_command,
        calibrate_command,
        inspect_commands,
        record_commands,
        run_command,
        search_commands,
        selftest_command,
        tool_commands,
    )

    app = typer.Typer(
        name="kvproof",
        help="Proves paged-KV serving code by running it: real scheduler, real page manager, real cache writes, every "
        "step checked.\n\nExample: kvproof run scenarios/quickstart.yaml",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    groups = (
        run_command,
        record_commands,
        search_commands,
        selftest_command,
        inspect_commands,
        audit_command,
        tool_commands,
        calibrate_command,
    )
    for group in groups:
        group.register(app)
    return app


@contextmanager
def _term_as_ctrl_c() -> Generator[None]:
    """A SIGTERM (of `timeout`, of a batch system) is a Ctrl-C while this is open, unless somebody handles either."""
    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    if usual != (signal.SIG_DFL, signal.default_int_handler) or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _of_interrupt(end: SystemExit) -> bool:
    """Whether typer made this exit of a KeyboardInterrupt: then nobody has said so yet."""
    error: BaseException | None = end
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _failed(error: Exception) -> int:
    from sim.cli.errors import status_of

    if os.environ.get("KVPROOF_DEBUG") == "1":
        raise error
    status, message = status_of(error)
    _say(message)
    return status


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
