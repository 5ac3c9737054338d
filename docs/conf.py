"""Settings of the documentation: ``sphinx-build -W --keep-going -n docs build/docs``."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import kfac_xp  # noqa: E402

project = "kfac_xp"
author = "the authors of kfac_xp"
version = release = kfac_xp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
html_theme = "furo"
html_title = f"kfac_xp {version}"
html_copy_source = False
html_show_copyright = False
highlight_language = "text"

# Pages are read on GitHub, too: links are those of Markdown, and headings have GitHub's anchors.
myst_heading_anchors = 4

# Docstrings say what arguments are; annotations would repeat it in the words of a type checker.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
# A single backquote in a docstring is a link where it names something public, and code elsewhere.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:exc", "numpy.linalg.LinAlgError")]
