from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octoc.errors import DataError, UsageError
from octoc.metrics import METRICS, Drop, class_numbers, cosine, default_metric, get_metric, loss, parse_drop, top1, top5

LOGITS = np.random.default_rng(0).normal(size=(40, 10)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 10, 40)


def test_top1_and_top5_agree_with_torch() -> None:
    best = torch.from_numpy(LOGITS).topk(5, dim=1).indices.numpy()
    assert top1(LOGITS, LABELS) == pytest.approx(100 * (best[:, 0] == LABELS).mean())
    assert top5(LOGITS, LABELS) == pytest.approx(100 * (best == LABELS[:, None]).any(1).mean())


def test_loss_agrees_with_torch_and_survives_large_logits() -> None:
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(LOGITS), torch.from_numpy(LABELS)).item()
    assert loss(LOGITS, LABELS) == pytest.approx(expected, rel=1e-5)
    assert loss(np.array([[1e4, -1e4]]), np.array([1])) == pytest.approx(2e4)


def test_cosine_agrees_with_torch() -> None:
    other = LOGITS + 0.3
    expected = torch.cosine_similarity(torch.from_numpy(LOGITS), torch.from_numpy(other), dim=1).mean().item()
    assert cosine(other, LOGITS) == pytest.approx(100 * expected, rel=1e-5)


def test_shares_are_counted_in_points() -> None:
    outputs = np.eye(4)
    assert top1(outputs, np.array([0, 1, 2, 0])) == 75.0
    assert cosine(outputs, outputs) == pytest.approx(100.0)


def test_nan_outputs_are_never_right() -> None:
    broken = np.full((3, 4), np.nan)
    labels = np.zeros(3, int)
    assert (top1(broken, labels), top5(broken, labels), cosine(broken, np.ones((3, 4)))) == (0.0, 0.0, 0.0)
    assert loss(broken, labels) == math.inf


def test_an_infinite_output_of_a_wrong_class_does_not_make_a_good_loss() -> None:
    assert loss(np.array([[np.inf, 0.0]]), np.array([1])) == math.inf
    assert loss(np.array([[0.0, -np.inf]]), np.array([0])) == 0.0
    assert loss(np.array([[0.0, -np.inf]]), np.array([1])) == math.inf


def test_zero_outputs_agree_with_zero_outputs_alone() -> None:
    zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
    assert cosine(zeros, zeros) == 100.0
    assert cosine(zeros, ones) == 0.0


def test_classes_with_axes_of_one_after_them_are_classes() -> None:
    assert top1(LOGITS[:, :, None, None], LABELS) == top1(LOGITS, LABELS)


@pytest.mark.parametrize("name", ["top1", "top5", "loss"])
@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (np.zeros((3, 1)), np.zeros(3, int), r"outputs are \[3, 1\], not \[samples, 2 or more\]; use --metric cosine"),
        (np.zeros(3), np.zeros(3, int), r"outputs are \[3\]"),
        (np.zeros((3, 4, 5)), np.zeros(3, int), r"outputs are \[3, 4, 5\]"),
        (np.zeros((3, 4)), np.zeros(3), "needs integer labels"),
        (np.zeros((3, 4)), np.zeros((3, 1), int), "needs integer labels"),
        (np.zeros((3, 4)), np.array([0, 1, 4]), "labels run from 0 to 4; the network has 4 classes"),
        (np.zeros((3, 4)), np.array([-1, 1, 3]), "labels run from -1 to 3"),
        (np.zeros((3, 4)), np.zeros(2, int), "3 outputs for 2 targets"),
        (np.zeros((0, 4)), np.zeros(0, int), "at least one sample"),
        (np.zeros((3, 4)), None, r"needs labels \(y\), and the data has none; cosine needs no labels"),
    ],
)
def test_what_a_class_metric_cannot_count_is_refused(
    name: str, outputs: np.ndarray, labels: np.ndarray | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        METRICS[name](outputs, labels)


def test_cosine_takes_outputs_of_any_shape_and_refuses_two_shapes() -> None:
    assert METRICS["cosine"](np.ones(4), np.ones(4)) == 100.0
    with pytest.raises(DataError, match=r"outputs are \[2, 3\]; the original's are \[2, 4\]"):
        METRICS["cosine"](np.ones((2, 3)), np.ones((2, 4)))


def test_the_default_is_top1_where_labels_are_class_numbers_and_cosine_elsewhere() -> None:
    assert default_metric(LABELS).name == "top1"
    assert default_metric(LABELS.astype(np.uint8)).name == "top1"
    for labels in (None, LABELS.astype(float), LABELS[:, None]):
        assert default_metric(labels).name == "cosine"


def test_a_metric_of_the_users_is_called_with_outputs_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def error(outputs, labels):\n    return -abs(outputs - labels).mean()\n"
        "def broken(outputs, labels):\n    raise ValueError('no')\n"
        "def nothing(outputs, labels):\n    return float('nan')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    metric = get_metric("own_metrics:error")
    assert (metric(np.ones(4), np.zeros(4)), metric.higher_is_better, metric.needs_labels) == (-1.0, True, True)
    with pytest.raises(DataError, match="own_metrics:broken failed: ValueError: no"):
        get_metric("own_metrics:broken")(np.ones(4), np.zeros(4))
    with pytest.raises(DataError, match="returned NaN for 4 samples"):
        get_metric("own_metrics:nothing")(np.ones(4), np.zeros(4))
    with pytest.raises(UsageError, match="is int, not a function"):
        get_metric("own_metrics:number")


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no metric 'top2'; there are top1, top5, loss, cosine, or package"):
        get_metric("top2")


@pytest.mark.parametrize(
    ("text", "drop"),
    [
        ("1", Drop(1, False)),
        ("0.5", Drop(0.5, False)),
        ("0", Drop(0, False)),
        ("1%", Drop(0.01, True)),
        (" .5 % ", Drop(0.005, True)),
    ],
)
def test_a_drop_is_points_or_a_share(text: str, drop: Drop) -> None:
    assert parse_drop(text) == drop


@pytest.mark.parametrize("text", ["", "-1", "nan", "1e3", "101%", "inf%", "%", "one", "1%%", "1 2", "٣"])
def test_what_is_no_drop_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a drop"):
        parse_drop(text)


def test_the_limit_lies_below_a_score_and_above_a_loss() -> None:
    assert Drop(1.0, False).limit(91.5, METRICS["top1"]) == 90.5
    assert Drop(0.01, True).limit(50.0, METRICS["top1"]) == 49.5
    assert Drop(0.1, True).limit(2.0, METRICS["loss"]) == pytest.approx(2.2)
    assert not Drop(math.inf, False).holds(math.nan, 91.5, METRICS["top1"])


@given(st.integers(1, 999), st.integers(0, 100))
def test_a_value_exactly_at_the_limit_holds_and_one_more_error_does_not(right: int, lost: int) -> None:
    drop, metric = parse_drop(f"{lost / 10:.1f}"), METRICS["top1"]
    baseline = 100 * (right / 1000)
    assert drop.holds(100 * ((right - lost) / 1000), baseline, metric)
    assert not drop.holds(100 * ((right - lost - 1) / 1000), baseline, metric)


@given(st.text(max_size=8))
def test_any_text_is_a_drop_or_a_usage_error(text: str) -> None:
    try:
        drop = parse_drop(text)
    except UsageError:
        return
    assert drop.value >= 0


def test_whole_floats_are_class_numbers_where_the_network_has_so_many_classes() -> None:
    found = class_numbers(LABELS.astype(np.float64), LOGITS)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, LABELS)
    for labels, outputs in (
        (LABELS + 0.5, LOGITS),
        (LABELS + 1.0, LOGITS[:, :9]),
        (LABELS - 1.0, LOGITS),
        (np.full(40, np.nan), LOGITS),
        (LABELS.astype(np.float32), LOGITS[:, :1]),
        (LABELS.astype(np.float32), LOGITS[:, 0]),
        (LABELS.astype(np.float32)[:, None], LOGITS),
    ):
        assert class_numbers(labels, outputs) is labels


def test_a_drop_may_be_a_number_however_small() -> None:
    assert parse_drop(0.00001) == Drop(1e-05, False)
    assert parse_drop(2) == Drop(2.0, False)
    for wrong in (-1, float("nan")):
        with pytest.raises(UsageError, match="points of the metric"):
            parse_drop(wrong)
