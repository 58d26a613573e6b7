"""`octoc compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octoc.commands import options
from octoc.commands.terminal import reader, work

if TYPE_CHECKING:
    from octoc.report import Report


@click.command()
@click.argument("model")
@options.device(required=True)
@click.option("--data", required=True, metavar="DATA", help="What quality is counted on: .npz (x, y), .npy, a folder.")
@click.option("--out", type=options.FILE, metavar="DIR", help="Gets DEVICE/FORMAT/ and report.html; not for --dry-run.")
@click.option(
    "--calibration", metavar="DATA", help="Samples to calibrate on, without those in --data; else split from it."
)
@options.weights_file
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="onnx, tflite, coreml or all; may be repeated. Default: the device's first.",
)
@click.option("--max-size", metavar="SIZE", help="Budget of each artefact, such as 150kB (1 kB = 1000 bytes).")
@click.option("--max-drop", metavar="DROP", help="Quality that may be lost: points of the metric (1) or a share (1%).")
@click.option(
    "--weights",
    metavar="ENCODING",
    help="Such as int8, int4, palette4, float16. Default: the planner chooses where there is a goal, else int8.",
)
@click.option("--bits", type=int, metavar="N", help="Width of every code, 1 to 8, in place of --weights.")
@click.option("--group-size", type=int, metavar="N", help="Weights that share a scale, or channels that share a table.")
@click.option(
    "--avg-bits", type=float, metavar="BITS", help="Most bits a weight on average, scales and tables counted: 3.3."
)
@click.option("--method", metavar="NAME", help="How weights are encoded: gptq, rtn ... Default: gptq up to 4 bits.")
@click.option(
    "--sensitivity",
    type=options.FILE,
    metavar="FILE",
    help="sensitivity.json of an earlier run on this network, in place of measuring.",
)
@options.activations
@click.option(
    "--recover", metavar="TIME", help="Train towards the original's outputs: 15min, or none (the default). No labels."
)
@click.option("--sparsity", type=float, metavar="SHARE", help="Share of weights to prune, between 0 and 1.")
@click.option("--rank", type=float, metavar="SHARE", help="Share of the full rank to keep, between 0 and 1.")
@click.option(
    "--metric",
    metavar="METRIC",
    help="top1, top5, loss, cosine or module:function. Default: top1 with class numbers, else cosine.",
)
@click.option("--recipe", type=options.FILE, metavar="FILE", help="Replay a recipe.json, instead of options that plan.")
@click.option("--recompute", is_flag=True, help="With --recipe: compute codes anew, not from the proof beside it.")
@options.devices_file
@options.seed
@click.option("--dry-run", is_flag=True, help="Plan, and say what is reachable; write nothing.")
@options.as_json
@options.quiet
@options.traceback
def compress(out: Path | None, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Compress MODEL for devices, write the artefacts, verify and report.

    MODEL is a .pt2 file of torch.export, or package.module:function that returns a module.
    """
    if out is None and not chosen["dry_run"]:
        raise click.UsageError("Missing option '--out'; only --dry-run goes without", click.get_current_context())
    with work(quiet, out) as progress:
        from octoc.pipeline import compress_model

        report = compress_model(out=out or Path(), progress=progress, **chosen)
    finish(report, None if chosen["dry_run"] else out, as_json, quiet)


def finish(report: Report, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Prints a report, and where its page is; raises where a goal or a check did not hold."""
    from octoc.report.verdict import require_held

    with reader():
        if as_json:
            click.echo(report.to_json(), nl=False)
        elif not quiet:
            from rich.console import Console

            from octoc.report.terminal import print_report

            print_report(report, Console())
            if out is not None:
                click.echo(f"Report: {out / 'report.html'}")
    require_held(report)
