"""The site that `make site` builds from these pages and the library's docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "extensions"))

project = "torchprune"
copyright = "the authors of torchprune, Apache-2.0"
html_title = "torchprune"
language = "en"

root_doc = "README"
exclude_patterns = ["extensions", "figures", "_static"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "navigation",
    "reference",
    "code_names",
]
suppress_warnings = ["toc.not_included"]  # the extension `navigation` says more

public_packages = [
    "torchprune",
    "torchprune.training",
    "torchprune.passes",
    "torchprune.export",
    "torchprune.testing",
]

myst_heading_anchors = 4

default_role = "py:obj"  # docstrings have single backticks
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
