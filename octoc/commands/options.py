"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def _remember(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta["octoc.traceback"] = value


traceback = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_remember,
    help="Show where an error came from, and everything that libraries say.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, and nothing else there.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
devices_file = click.option("--devices-file", type=FILE, metavar="FILE", help="Further device profiles (YAML).")
weights_file = click.option(
    "--weights-file", type=FILE, metavar="FILE", help="Weights for a factory: safetensors, or torch.save's."
)
activations = click.option(
    "--activations",
    type=click.Choice(["float", "int8", "int8-all"]),
    help="int8 leaves a start in floats where that pays, int8-all none. Default: float, or what the device runs.",
)
seed = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)


def device(required: bool) -> Callable[[Command], Command]:
    """`--device NAME`, once for each device."""
    text = "A device of `octoc devices`; may be repeated."
    return click.option("--device", "devices", metavar="NAME", multiple=True, required=required, help=text)
