"""`octoc devices`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octoc.commands import options

if TYPE_CHECKING:
    from rich.console import Console

    from octoc.device import Accelerator, Device, Figure


@click.command()
@click.argument("name", required=False)
@options.devices_file
@options.as_json
@options.traceback
def devices(name: str | None, devices_file: Path | None, as_json: bool) -> None:
    """List the devices, or show one with its figures and their sources."""
    from octoc.device import find_device, load_devices

    known = load_devices(devices_file)
    chosen = None if name is None else find_device(name, known)
    if as_json:
        click.echo(json.dumps([asdict(d) for d in known.values()] if chosen is None else asdict(chosen), indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if chosen is None:
        _print_all(known.values(), console)
    else:
        _print_one(chosen, console)


def _print_all(known: Iterable[Device], console: Console) -> None:
    from rich.table import Table

    from octoc.units import format_size

    table = Table("device", "name", "app memory", "formats", "first accelerator", box=None, header_style="bold")
    for device in known:
        memory = device.app_memory_bytes()
        size = "-" if memory is None else format_size(int(memory))
        accelerator = device.runners(device.formats[0])[0].name
        table.add_row(device.id, device.name, size, ", ".join(device.formats), accelerator)
    console.print(table)


def _print_one(device: Device, console: Console) -> None:
    from rich.markup import escape

    version = f" {device.os_version}" if device.os_version else ""
    console.print(escape(f"{device.name} ({device.id}), {device.platform}{version}"), style="bold")
    console.print(f"formats: {', '.join(device.formats)} (the first is the default)")
    figures = [(key, getattr(device, key)) for key in ("ram", "storage", "model_budget", "bandwidth")]
    for limit in device.memory:
        since = f" since {limit.since}" if limit.since else ""
        figures.append((f"app memory{since}{' with the entitlement' if limit.entitled else ''}", limit.limit))
    _print_figures(figures, console)
    for accelerator in device.accelerators:
        console.print()
        _print_accelerator(device, accelerator, console)


def _print_accelerator(device: Device, accelerator: Accelerator, console: Console) -> None:
    from rich.markup import escape

    console.print(escape(f"{accelerator.name} ({accelerator.kind}), {', '.join(accelerator.formats)}"), style="bold")
    console.print(f"activations: {', '.join(device.activations(accelerator))}")
    encodings = [
        encoding.name + (f" of {', '.join(map(str, encoding.groups))}" if encoding.groups else "")
        for encoding in device.encodings(accelerator)
    ]
    console.print(f"weights: {'; '.join(encodings)}")
    names = ("peaks", "dispatch", "working_set", "working_set_cliff", "channel_multiple")
    _print_figures([(key, getattr(accelerator, key)) for key in names], console)
    console.print(escape(f"source: {accelerator.source}{' (estimate)' if accelerator.estimate else ''}"))


def _print_figures(rows: Iterable[tuple[str, tuple[Figure, ...]]], console: Console) -> None:
    from rich.markup import escape

    for key, figures in rows:
        for figure in figures:
            value = "unknown" if figure.value is None else f"{figure.value:g} {figure.unit}"
            details = [figure.dtype, "estimate" if figure.estimate else None]
            shown = "".join(f", {detail}" for detail in details if detail)
            console.print(escape(f"{key.replace('_', ' ')}: {value}{shown} [{figure.source}]"))
