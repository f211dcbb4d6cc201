"""The page of the Python API names what exists, and all that the package offers."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
from pages import DOCS, text_of

import ijepa_scale

NAMED = re.findall(r"^::: ([\w.]+)$", text_of(DOCS / "python-api.md"), flags=re.MULTILINE)


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        return importlib.import_module(name)


@pytest.mark.parametrize("name", NAMED)
def test_a_name_leads_to_something_with_a_docstring(name: str) -> None:
    assert inspect.getdoc(found(name))


def test_all_that_the_package_offers_is_named() -> None:
    named = [found(name) for name in NAMED]
    offered = [name for name in ijepa_scale.__all__ if not name.startswith("__")]
    assert offered and all(any(getattr(ijepa_scale, name) is each for each in named) for name in offered), offered
