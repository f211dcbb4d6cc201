"""JSON files: what is read, and the one line for each that isn't JSON."""

from __future__ import annotations

import re

import pytest

from ijepa_scale.config.json_text import parse_json


def test_plain_values_are_read() -> None:
    text = '\ufeff{"a": [1, -9223372036854775808, 1.5, 1e3, true, null, "é"], "b": {}}'
    assert parse_json(text.encode()) == {"a": [1, -(2**63), 1.5, 1000.0, True, None, "é"], "b": {}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"[NaN]", "NaN isn't a finite number"),
        (b"[-Infinity]", "-Infinity isn't a finite number"),
        (b"[1e999]", "1e999 isn't a finite number"),
        (b"[9223372036854775808]", "9223372036854775808 doesn't fit into 64 bits"),
        (b"9" * 5000, "99999999999999999999 doesn't fit into 64 bits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{{ stage }}", "Expecting property name"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (b"", "Expecting value"),
        (b"[1, 2", "Expecting ',' delimiter"),
    ],
)
def test_anything_else_is_refused_in_one_line(content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        parse_json(content)
    assert len(str(caught.value).splitlines()) == 1
