from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoc.errors import UsageError
from octoc.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("150kB", 150_000),
        ("150 KB", 150_000),
        ("150KiB", 153_600),
        ("1.5MB", 1_500_000),
        ("2MiB", 2_097_152),
        (".5kB", 500),
        ("4096", 4096),
        ("17B", 17),
        ("0.3kB", 300),
        ("1GB", 10**9),
        ("1.9999B", 1),
    ],
)
def test_a_size_is_read_in_powers_of_1000_or_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0kB",
        "-1",
        "-1kB",
        "nan",
        "inf",
        "kB",
        "1e6",
        "1,5MB",
        "150k",
        "1 2kB",
        "1_000",
        "٣kB",
        "0.4B",
        "9" * 5000,
    ],
)
def test_what_is_no_size_is_refused_on_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_a_usage_error(text: str) -> None:
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert size >= 1


@given(st.integers(1, 10**15))
def test_a_written_size_reads_back_within_half_of_its_last_digit(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.006 * size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (150_000, "150 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_234_567, "1.23 MB"),
        (14 * 10**9, "14.0 GB"),
    ],
)
def test_a_size_is_written_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text
