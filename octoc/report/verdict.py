"""A report -> the error that the command line ends with, or none."""

from __future__ import annotations

from octoc.errors import GoalError, VerificationError
from octoc.report import ArtifactReport, Check, Report


def require_held(report: Report) -> None:
    """Does nothing where every goal and check held.

    Raises:
        VerificationError: an artefact failed a check; this outweighs a missed goal.
        GoalError: a budget or a quality goal was missed.
    """
    failed = [(artifact, check) for artifact in report.artifacts for check in artifact.checks if not check.held]
    if failed:
        raise VerificationError(_line("verification failed", failed))
    missed = [(artifact, goal) for artifact in report.artifacts for goal in artifact.goals if not goal.held]
    if missed:
        raise GoalError(_line("goal missed", missed))


def _line(what: str, found: list[tuple[ArtifactReport, Check]]) -> str:
    artifact, check = found[0]
    more = f" (and {len(found) - 1} more, see the report)" if len(found) > 1 else ""
    return f"{what}: {artifact.path or f'{artifact.device}/{artifact.format}'}: {check.name}: {check.detail}{more}"
