"""The section of the request of a run: its settings, versions and machine."""

from __future__ import annotations

import json
from typing import Any

from pyro_sbp.reports import pages
from pyro_sbp.reports.findings import Findings
from pyro_sbp.reports.pictures import Pictures

__all__ = ["settings"]


def settings(found: Findings, pictures: Pictures) -> list[str]:
    """The content of `recipe.json`, with one row for each value."""
    rows = []
    for key, value in found.run.asked.items():
        if isinstance(value, dict) and value:
            rows += [(f"{key}: {name}", _text(inner)) for name, inner in value.items()]
        else:
            rows.append((key, _text(value)))
    return [pages.details("Recipe, seed, versions and machine", [pages.table(("", "value"), rows)])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
