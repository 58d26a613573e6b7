"""The page: self-contained, the same bytes for the same report, escaped, complete, and right at the odd ends."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from sample import artifact, deep, dry_run, resnet20, sample_report

from octoc.errors import HostError
from octoc.report import ArtifactReport, Check, Note, Report
from octoc.report.html import write_html

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(report: Report, folder: Path) -> str:
    path = folder / "report.html"
    write_html(report, path)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(sample_report(), tmp_path_factory.mktemp("page"))


def test_nothing_is_fetched_and_nothing_is_run(text: str) -> None:
    assert "http:" not in text.replace("http://www.w3.org/", "")
    assert "https:" not in text
    assert "@import" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "image"}
        assert "src" not in attributes
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name.endswith("href"):
                assert (value or "").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_reference_within_the_page_has_exactly_one_target(text: str) -> None:
    ids = Counter(attributes["id"] for _, attributes in Page(text).tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    used = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)


def test_the_same_report_gives_the_same_bytes_whatever_the_settings_of_matplotlib(text: str, tmp_path: Path) -> None:
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "figure.dpi": 31, "axes.grid": True}):
        assert written(sample_report(), tmp_path) == text
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_every_artefact_layer_failure_reason_and_note_appears(text: str) -> None:
    report = sample_report()
    shown = Page(text).text
    for entry in report.artifacts:
        wanted = [entry.device, entry.format, entry.path or "", *entry.notes]
        wanted += [part for check in (*entry.goals, *entry.checks) for part in (check.name, check.detail)]
        wanted += [part for note in (*entry.skipped, *entry.fallbacks) for part in (note.what, note.reason)]
        wanted += [part for layer in entry.layers for part in (layer.name, layer.scheme)]
        assert [part for part in wanted if part not in shown] == []
    assert "1 goal missed and 1 check failed, in 1 of 3 artefacts." in shown
    assert "48.0 % of it inside converter libraries" in shown


def test_pictures_are_labelled_and_follow_the_page_in_colour_and_font(text: str) -> None:
    page = Page(text)
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == 2 + 3 * 3
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
    drawn = "".join(re.findall(r"<svg role.*?</svg>", text, flags=re.DOTALL))
    assert "font-family" not in drawn
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    assert "var(--scheme-0)" in drawn


def test_the_page_of_twenty_layers_and_three_artefacts_is_small(text: str) -> None:
    assert len(text.encode()) < 400_000


def test_names_with_special_characters_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&amp;\"$x^2$"
    line = artifact("onnx", [(evil, evil, (4, 4), 16), ("層.weight\n🙂", "linear", (4, 4), 16)])
    bad = (Note(evil, evil),)
    line = replace(
        line, device=evil, path=evil, skipped=bad, fallbacks=bad, notes=(evil,), checks=(Check(evil, False, evil),)
    )
    report = replace(sample_report(), model=evil, metric=evil, unit="<b>", artifacts=(line,), seconds={evil: 1.0})
    page = Page(written(report, tmp_path))
    assert page.all("script") == []
    assert page.all("b") == []
    assert page.text.count(evil) >= 8


@pytest.mark.parametrize(
    ("value", "goal"), [(None, math.inf), (math.nan, 1.0), (math.inf, math.nan), (-math.inf, None)]
)
def test_values_that_are_missing_or_not_finite_are_named_and_not_drawn(
    value: float | None, goal: float | None, tmp_path: Path
) -> None:
    report = sample_report()
    odd = [replace(layer, sensitivity=value, error=value or 0.0, bits=math.nan) for layer in report.artifacts[0].layers]
    points = [replace(point, predicted=value or 0.0, quality=value) for point in report.artifacts[0].front]
    goals = (Check("size", True, "size", goal), Check("drop", False, "drop", goal))
    line = replace(
        report.artifacts[0], layers=tuple(odd), front=tuple(points), quality=value, drop=value, goals=goals,
        agreement=value, seconds={"search": value or 0.0},
    )  # fmt: skip
    report = replace(report, quality=report.quality if value is None else value, artifacts=(line,))
    shown = written(report, tmp_path)
    assert not re.search(r"\bnan\b|\binf\b", "".join(re.findall(r"<svg.*?</svg>", shown, flags=re.DOTALL)))
    assert not re.search(r"\bnan\b|\binf\b", Page(shown).text)


def bare(entry: ArtifactReport) -> ArtifactReport:
    return replace(entry, layers=(), front=(), goals=(), checks=(), skipped=(), fallbacks=(), notes=(), seconds={})


LONG = "a.very.long.name." * 20
ODD = {
    "no artefacts": (replace(sample_report(), artifacts=(), seconds={}), "No artefact came out"),
    "a dry run": (dry_run(), "this is a plan and nothing was written"),
    "one layer": (replace(sample_report(), artifacts=(artifact("onnx", resnet20()[:1]),)), "1 weight,"),
    "no layers, no front, no checks": (
        replace(sample_report(), artifacts=(bare(sample_report().artifacts[0]),)),
        "Nothing was searched.",
    ),
    "a tiny model": (replace(sample_report(), nbytes=0, parameters=0, macs=0), "0 B"),
    "a huge model": (replace(sample_report(), nbytes=14 * 10**9, parameters=7 * 10**9, macs=9 * 10**15), "14.0 GB"),
    "lower is better": (
        replace(sample_report(), metric="loss", unit="", higher_is_better=False, quality=0.31234),
        "lower is better",
    ),
    "long names": (
        replace(sample_report(), model=LONG, artifacts=(replace(artifact("onnx", deep(9)), device=LONG),)),
        LONG,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_page_is_written_for(name: str, tmp_path: Path) -> None:
    report, words = ODD[name]
    assert words in Page(written(report, tmp_path)).text


def test_tick_labels_of_five_hundred_layers_are_thinned(tmp_path: Path) -> None:
    text = written(replace(sample_report(), artifacts=(artifact("tflite", deep(500)),)), tmp_path)
    picture = next(svg for svg in re.findall(r"<svg role.*?</svg>", text, flags=re.DOTALL) if "network order" in svg)
    assert 10 <= picture.count("<text") <= 60
    assert len(text) < 700_000


def test_a_goal_is_red_only_where_it_is_missed_in_the_direction_of_the_metric(tmp_path: Path) -> None:
    report = sample_report()
    entry = replace(report.artifacts[0], quality=0.5, goals=(Check("drop", True, "drop", 0.4),), front=())
    report = replace(report, quality=0.45, unit="", artifacts=(entry,))
    with_red = {}
    for higher in (True, False):
        text = written(replace(report, higher_is_better=higher), tmp_path)
        assert "goal 0.4)" in text
        with_red[higher] = "var(--failed)" in "".join(re.findall(r"<svg role.*?</svg>", text, flags=re.DOTALL))
    assert with_red == {True: False, False: True}


def test_nothing_is_logged_and_the_loggers_are_left_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(sample_report(), tmp_path)
    assert caplog.records == []
    assert logging.getLogger("matplotlib").level == logging.NOTSET


def test_a_page_that_cannot_be_written_is_an_error_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"report\.html cannot be written"):
        write_html(replace(sample_report(), artifacts=()), tmp_path / "missing" / "report.html")
