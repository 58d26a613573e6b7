"""`octoc verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from octoc.commands import options
from octoc.commands.terminal import reader, work


@click.command()
@click.argument("artifact", type=options.FILE, metavar="ARTEFACT")
@click.option("--proof", type=options.FILE, metavar="FILE", help="Default: proof.safetensors beside the artefact.")
@options.as_json
@options.quiet
@options.traceback
def verify(artifact: Path, proof: Path | None, as_json: bool, quiet: bool) -> None:
    """Check that ARTEFACT is what was proven: its codes, its outputs, its bytes."""
    with work(quiet):
        from octoc.verify import require, verify_file

        checks = verify_file(artifact, proof)
    with reader():
        if as_json:
            held = all(check.held for check in checks)
            found = {"artifact": str(artifact), "held": held, "checks": [asdict(check) for check in checks]}
            click.echo(json.dumps(found, indent=1))
        elif not quiet:
            for check in checks:
                click.echo(f"{'ok  ' if check.held else 'FAIL'}  {check.name}: {check.detail}")
    require(checks, artifact)
