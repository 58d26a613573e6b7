"""What the user sees while work runs: progress bars on a terminal, and nothing that libraries print."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from octoc.commands import interrupt
from octoc.errors import HostError
from octoc.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Display
    from rich.progress import TaskID


class Quiet(Silent):
    """Nobody watches, but an interrupt that a library swallowed still ends the work at the next stage."""

    def start(self, what: str, total: int | None) -> None:
        if interrupt.received():
            raise KeyboardInterrupt


class Bars(Quiet):
    """A bar for each stage of the work; stages may nest."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.running: list[TaskID] = []

    def start(self, what: str, total: int | None) -> None:
        super().start(what, total)
        self.running.append(self.display.add_task(what, total=total))

    def advance(self, steps: int = 1) -> None:
        if self.running:
            self.display.advance(self.running[-1], steps)

    def finish(self) -> None:
        self.display.remove_task(self.running.pop())


def reader_left(error: BaseException | None) -> bool:
    """Whether an error says that whoever reads our output has gone; rich and click make a SystemExit of that."""
    if isinstance(error, SystemExit):
        error = error.__context__
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def leave_stdout() -> None:
    """Nobody reads on: Python must not try to write the rest of it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def reader() -> Iterator[None]:
    """Printing inside: a reader that leaves early, as `head` does, changes nothing of how the command ends."""
    try:
        yield
        sys.stdout.flush()
    except (OSError, SystemExit) as error:
        if not reader_left(error):
            raise
        leave_stdout()


@contextmanager
def work(quiet: bool = False, out: Path | None = None) -> Iterator[Progress]:
    """Long work inside: bars on stderr where that is a terminal, libraries held silent unless `--traceback` is given.

    Converters and runtimes warn, log and print, from Python and from C++. None of it is about what the user did: what
    matters of it is in the report. File descriptors are what both have in common, so these are turned away.

    Args:
        quiet: no bars.
        out: the folder of results, whose state an interrupted user wants to know.

    Raises:
        HostError: interrupted, or a pipe between us and a process of a library broke.
    """
    try:
        with _watched(quiet) as progress:
            yield progress
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not interrupt.received():
            if reader_left(error):  # not ours to forgive: no one reads along while work runs
                raise HostError(f"a pipe that the work needs broke: {error}") from error
            raise
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has just written ^C
        raise HostError("interrupted" + (f"; nothing half-written was left in {out}" if out else "")) from None


@contextmanager
def _watched(quiet: bool) -> Iterator[Progress]:
    with ExitStack() as stack:
        err: TextIO = sys.stderr
        if not click.get_current_context().meta.get("octoc.traceback"):
            err = stack.enter_context(_silenced())
        if quiet or not err.isatty():
            yield Quiet()
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        display = Display(*columns, console=Console(file=err), transient=True)
        yield Bars(stack.enter_context(display))


@contextmanager
def _silenced() -> Iterator[TextIO]:
    """Turns file descriptors 1 and 2 to nowhere; yields a stream that still reaches the user's stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        with os.fdopen(os.dup(saved[1]), "w", encoding=sys.stderr.encoding, errors="replace") as err:
            yield err
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
