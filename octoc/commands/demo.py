"""`octoc demo`."""

from __future__ import annotations

from pathlib import Path

import click

from octoc.commands import options
from octoc.commands.compress import finish
from octoc.commands.terminal import reader, work


@click.command()
@click.option("--out", type=options.FILE, default="build/demo", show_default=True, metavar="DIR")
@options.as_json
@options.quiet
@options.traceback
def demo(out: Path, as_json: bool, quiet: bool) -> None:
    """Train a small network on scikit-learn's digits and compress it for three devices."""
    from octoc.demo import command_lines, prepare, run

    with work(quiet, out) as progress:
        files = prepare(out, progress)
    if not (quiet or as_json):
        with reader():
            click.echo("\n".join(command_lines(files)))
    with work(quiet, out) as progress:
        report = run(files, progress)
    finish(report, out, as_json, quiet)
