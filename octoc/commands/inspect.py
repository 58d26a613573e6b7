"""`octoc inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from octoc.commands import options
from octoc.commands.terminal import work

if TYPE_CHECKING:
    from rich.console import Console

    from octoc.inspect import Inspection, Refusals

_SHOWN = 20  # refusals of a device on the terminal; --json has them all


@click.command()
@click.argument("model")
@options.device(required=False)
@options.weights_file
@click.option("--data", metavar="DATA", help="Samples that give the shapes of a factory's inputs.")
@click.option(
    "--input-shape", "shapes", multiple=True, metavar="N,...", help="Or the shapes: 1,3,32,32 for each input."
)
@options.activations
@options.devices_file
@options.as_json
@options.traceback
def inspect(model: str, as_json: bool, **chosen: Any) -> None:
    """Show what MODEL is made of, and what each device's accelerator would refuse."""
    with work():
        from octoc.inspect import inspect_model

        found = inspect_model(model, **chosen)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    from rich.console import Console

    console = Console()
    _print_layers(found, console)
    for refusals in found.devices:
        _print_refusals(refusals, console)


def _print_layers(found: Inspection, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from octoc.units import format_size

    for spec in found.inputs:
        sizes = ", ".join("any" if size is None else str(size) for size in spec.shape)
        console.print(escape(f"input {spec.name}: {spec.dtype} [{sizes}]"), highlight=False)
    table = Table("layer", "kind", "shape", box=None, header_style="bold")
    for name in ("weights", "bytes", "MACs", "activations"):
        table.add_column(name, justify="right")
    for layer in found.layers:
        shape = "x".join(map(str, layer.shape))
        costs = (format_size(layer.nbytes), f"{layer.macs:,}", format_size(layer.activation_bytes))
        table.add_row(escape(layer.name), layer.kind, shape, f"{layer.weights:,}", *costs)
    console.print(table)
    total = f"{found.parameters:,} parameters, {format_size(found.nbytes)}, {found.macs:,} MACs a sample"
    console.print(total, highlight=False)


def _print_refusals(found: Refusals, console: Console) -> None:
    from rich.markup import escape

    where = f"{found.device}, {found.format} ({found.dtype} activations)"
    if not found.refused:
        console.print(escape(f"{where}: {found.accelerator} runs all {found.operations} operations"), highlight=False)
        return
    console.print(escape(f"{where}: {len(found.refused)} of {found.operations} operations fall back"), highlight=False)
    for note in found.refused[:_SHOWN]:
        console.print(escape(f"  {note.what}: {note.reason}"), highlight=False)
    if len(found.refused) > _SHOWN:
        console.print(f"  and {len(found.refused) - _SHOWN} more (--json has them all)", highlight=False)
