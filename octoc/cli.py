"""The command line: parse, call, print. Nothing heavy is imported until a command runs.

Every command ends in one of five exit codes, and every failure in one line on stderr: `run` is the only place that
turns errors into either.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from octoc import __version__
from octoc.commands import interrupt
from octoc.commands.compress import compress
from octoc.commands.demo import demo
from octoc.commands.devices import devices
from octoc.commands.faults import host_fault
from octoc.commands.inspect import inspect
from octoc.commands.terminal import leave_stdout, reader_left
from octoc.commands.verify import verify
from octoc.errors import HostError, OctocError, UsageError

EPILOG = """\b
Exit codes:
  0  done, and every goal and check held
  1  a goal or budget was not reached; what was reached is kept
  2  usage: an option, a name or a configuration file cannot be meant
  3  the model, the data or an artefact is bad; a failed verification or an
     internal error is this too
  4  the environment: disk, permission, memory, a missing package, interrupted

\b
Try it:
  octoc demo
  octoc compress net.pt2 --device pixel-8 --data test.npz --out build
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="octoc")
def cli() -> None:
    """Compress a trained network for a device: CoreML, TFLite and ONNX files, verified."""


for command in (compress, verify, inspect, devices, demo):
    cli.add_command(command)


def main() -> NoReturn:
    """What the `octoc` script calls."""
    # Threads of torch that wait for one another spin; on a busy machine that turns seconds into minutes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    interrupt.listen()
    code = run(sys.argv[1:])
    interrupt.ignore()  # all is said; a late signal would only spoil the exit code
    try:
        sys.stdout.flush()
    except OSError:
        leave_stdout()
    if interrupt.received():
        # Where the signal met Python code that a C library ran, Python would now kill itself with it: no exit code.
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code.
    """
    try:
        result = cli.main(list(arguments), prog_name="octoc", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return UsageError.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f"; see `{context.command_path} --help`" if context is not None else ""
        return _fail(f"{error.format_message().rstrip('.')}{where}", UsageError.exit_code)
    except (BrokenPipeError, SystemExit) as error:
        if not reader_left(error):
            return _fail(f"the code that was called ended with sys.exit({error})", OctocError.exit_code)
        leave_stdout()  # whoever read our output had enough of it, and that is no fault
        return 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", HostError.exit_code)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line, a code, no traceback
        if "--traceback" in arguments:
            traceback.print_exc()
        return _fail(*_explain(error))
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the code to end with."""
    fault = host_fault(error)
    if fault is not None:
        return fault, HostError.exit_code
    if isinstance(error, OctocError):
        return str(error), error.exit_code
    text = f"{type(error).__name__}: {error}"
    return f"internal: {text} (run with --traceback to see where)", OctocError.exit_code


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code
