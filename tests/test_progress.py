"""Stages are told to whoever watches, and their seconds add up."""

from __future__ import annotations

import time

import pytest

from octoc.progress import Clock, Silent


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def start(self, what: str, total: int | None) -> None:
        self.told.append(("start", what, total))

    def advance(self, steps: int = 1) -> None:
        self.told.append(("advance", steps))

    def finish(self) -> None:
        self.told.append(("finish",))


def test_a_stage_is_started_advanced_and_finished_in_this_order() -> None:
    watcher = Watcher()
    clock = Clock(watcher)
    with clock.stage("run", "Running", 7):
        clock.progress.advance(3)
        clock.progress.advance()
    assert watcher.told == [("start", "Running", 7), ("advance", 3), ("advance", 1), ("finish",)]
    assert list(clock.seconds) == ["run"]


def test_seconds_are_those_inside_and_the_same_stage_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 12.5, 20.0, 21.0, 30.0, 30.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock()
    with clock.stage("a", "A"):
        pass
    with clock.stage("b", "B"):
        pass
    with clock.stage("a", "A again"):
        pass
    assert clock.seconds == {"a": 2.75, "b": 1.0}


def test_a_stage_that_fails_is_finished_and_timed_and_the_error_goes_on() -> None:
    watcher = Watcher()
    clock = Clock(watcher)
    with pytest.raises(KeyError, match="broken"), clock.stage("a", "A"):
        raise KeyError("broken")
    assert watcher.told[-1] == ("finish",)
    assert "a" in clock.seconds


def test_nobody_has_to_watch() -> None:
    silent = Silent()
    silent.start("A", None)
    silent.advance(5)
    silent.finish()
    first, second = Clock(), Clock()
    with first.stage("a", "A"):
        pass
    assert second.seconds == {}
