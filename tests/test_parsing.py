from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fbclip.errors import UsageError
from fbclip.parsing import parse_frame_size, parse_names, parse_numbers, parse_place, parse_resolution, parse_threshold


def test_values_as_people_write_them() -> None:
    assert (
        parse_frame_size("1080x1920") == parse_frame_size("1080X1920") == parse_frame_size("1080×1920") == (1080, 1920)
    )
    assert parse_resolution("1280x720") == (1280, 720)
    assert parse_numbers("1, 6,12", "numbers", "feature_layers") == (1, 6, 12)
    assert parse_numbers("4", "numbers", "batch") == (4,)
    assert parse_names("bottle, metal nut") == ("bottle", "metal nut")
    assert parse_threshold("0.25") == 0.25
    assert parse_threshold("auto") is None


@pytest.mark.parametrize("text", ["", "640", "0x640", "640x", "-1x5", "640x480x3", "100000x5", "640x48O"])
def test_sizes_that_are_none(text: str) -> None:
    for parse, option in ((parse_frame_size, "frame_size"), (parse_resolution, "resolution")):
        with pytest.raises(UsageError, match="in pixels, like") as refused:
            parse(text)
        assert refused.value.option == option


def numbers(text: str) -> tuple[int, ...]:
    return parse_numbers(text, "whole numbers", "threshold")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (numbers, "0"),
        (numbers, "1,,2"),
        (numbers, "1;2"),
        (numbers, "1.5"),
        (numbers, "٣"),
        (numbers, ""),
        (parse_threshold, "high"),
    ],
)
def test_numbers_that_are_none(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(UsageError, match="got") as refused:
        parse(text)
    assert refused.value.option == "threshold"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::]:1", ("::", 1)),
        ("prometheus.lan:65535", ("prometheus.lan", 65535)),
    ],
)
def test_places(text: str, place: tuple[str, int]) -> None:
    assert parse_place(text, "a rule", "metrics") == place


@pytest.mark.parametrize(
    "text", ["", "0", "65536", ":9464", "host:", "host", "::1:9464", "http://host:1", "a b:1", "-1"]
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="a rule; got"):
        parse_place(text, "a rule", "metrics")
