"""The configuration of Sphinx, which builds the documentation: `make docs`."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "pyro-sbp"
author = "the pyro-sbp developers"
version = release = version_of("pyro-sbp")

extensions = [
    "mathml",
    "myst_nb",
    "pictures",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Formulas are $...$ and ```math, as GitHub has them.
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]
# The tests run the notebooks.
nb_execution_mode = "off"
html_math_renderer = "mathml"

# Large, and their classes are not documented here.
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
# Fields of dataclasses; other libraries are not linked, so that the build needs no network.
nitpick_ignore = [
    ("py:class", "collections.abc.Mapping"),
    ("py:class", "collections.abc.Sequence"),
    ("py:class", "torch.Tensor"),
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings put code and names of Python between single backticks.
default_role = "code"
# Curly quotes, but no dashes: options of commands begin with two hyphens.
smartquotes_action = "q"

html_theme = "furo"
html_title = f"pyro-sbp {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Pages show pictures in <picture>, for light and dark, and Sphinx does not find their files.
html_extra_path = [path.name for path in Path(__file__).parent.glob("*.svg")]
html_show_copyright = False
