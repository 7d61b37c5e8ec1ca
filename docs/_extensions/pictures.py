"""Pictures for light and dark pages that follow the theme's switch.

The pages use `<picture>`, which GitHub understands and which follows the system only.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx

_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img alt="([^"]*)" src="([^"]+)">\s*</picture>'
)
_BOTH = r'<img class="only-light" alt="\2" src="\3"><img class="only-dark" alt="\2" src="\1">'


def _replace(app: Sphinx, document: nodes.document) -> None:
    for node in list(document.findall(nodes.raw)):
        text = node.astext()
        if "<picture>" in text:
            node.replace_self(nodes.raw("", _PICTURE.sub(_BOTH, text), format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Replace the pictures of every page."""
    app.connect("doctree-read", _replace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
