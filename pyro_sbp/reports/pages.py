"""The parts of a self-contained HTML page, without scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

__all__ = ["details", "heading", "page", "paragraph", "percent", "picture", "side", "table"]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #22262b; --soft: #5b636d;
  --line: #d5d9de; --card: #f4f6f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #16191d; --ink: #e4e6e9; --soft: #a3abb5;
  --line: #373d45; --card: #1f242a; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 2px solid var(--accent); }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; margin: .6rem 0; }
.note { border-left: 4px solid var(--accent); padding: .4rem .8rem; background: var(--card); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-start; }
.side > * { min-width: 0; max-width: 100%; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .3rem;
  position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: normal; }
figure { margin: .8rem 0; flex: 0 1 32rem; }
img { display: block; width: 100%; max-width: 32rem; height: auto; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 34rem) { th, td { padding: .25rem .45rem; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A complete page from parts in HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Makes the browser enforce that the page loads nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def heading(level: int, text: str) -> str:
    """A heading of level 1 to 6."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of the kind "", "note" or "soft"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def percent(value: float | None) -> str:
    """The text of a number in percent, with its unit."""
    return "-" if value is None else f"{value:.2f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """A table whose first column names the rows."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    words = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    # A table that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption or "table")}">'
        f"<table>{words}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(light: bytes, dark: bytes, words: str, caption: str = "") -> str:
    """A figure as two SVGs, for light and for dark pages.

    Args:
        light, dark: the SVGs.
        words: the alternative text.
        caption: the caption under the figure.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(words)}"></picture>{below}</figure>'
    )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def side(parts: Sequence[str]) -> str:
    """Parts side by side, if the page is wide enough."""
    return f'<div class="side">{"".join(parts)}</div>'


def details(title: str, parts: Sequence[str]) -> str:
    """Parts that are hidden until their title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"
