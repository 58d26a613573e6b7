"""One tree of errors; the command line prints the message on one line and exits with the class's code.

    OctocError                 3
    ├── UsageError             2   what the user typed cannot be meant
    ├── ModelError             3   the network cannot be read, run or exported
    ├── DataError              3   the samples or labels are not what the network takes
    ├── ArtifactError          3   a file is damaged or is not what it claims to be
    │   └── VerificationError  3   the file does not compute what the compressed network computes
    ├── GoalError              1   a budget or quality goal is not reached
    └── HostError              4   disk, permissions, a missing package

The low level states the numbers; the entry point adds what the user typed and what to do next.
"""

from __future__ import annotations


class OctocError(Exception):
    """Base of everything octoc raises on purpose. `str(error)` is one line, fit to print."""

    exit_code = 3


class UsageError(OctocError):
    """An option, a name or a configuration file cannot be meant as written."""

    exit_code = 2


class ModelError(OctocError):
    """The network cannot be read, run or exported."""


class DataError(OctocError):
    """The samples or labels do not fit the network."""


class ArtifactError(OctocError):
    """An artefact is damaged or is not what it claims to be."""


class VerificationError(ArtifactError):
    """An artefact disagrees with the compressed network."""


class GoalError(OctocError):
    """A budget or a quality goal is not reached. What was reached is kept and reported."""

    exit_code = 1


class HostError(OctocError):
    """The machine is at fault: disk full, no permission, a package that is not installed."""

    exit_code = 4


def reason(error: BaseException) -> str:
    """An error of somebody else's code on one line, its type first."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error of somebody else's code, where more lines would be a trace or a graph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
