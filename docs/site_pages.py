"""A Sphinx extension: the API pages, the README and its like as pages, and links that leave `docs`.

The API reference has a page for each group of names in `kfac_xp.__all__`. What is written goes
into ``docs/generated``.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from os.path import relpath
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring
from sphinx.util import logging

import kfac_xp

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
FROM_ROOT = {
    ROOT / "README.md": GENERATED / "readme.md",
    ROOT / "CONTRIBUTING.md": GENERATED / "contributing.md",
    ROOT / "CHANGELOG.md": GENERATED / "changes.md",
}
_kept: dict[str, list[str]] = {}
PUBLIC = {id(getattr(kfac_xp, name)): name for name in kfac_xp.__all__}


# ---------------------------------------------------------------------------------------------
# The API reference


def groups() -> dict[str, list[str]]:
    """``{title: names}`` as the comments in `__all__` divide them.

    Raises
    ------
    ValueError
        If what was read is not `__all__`: a name stands above the first comment, or not on a line
        of its own.
    """
    source = Path(kfac_xp.__file__).read_text()
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in source.partition("__all__ = [\n")[2].splitlines():
        if comment := re.fullmatch(r"    # (.+)", line):
            names = found.setdefault(comment[1], [])
        elif name := re.fullmatch(r'    "(\w+)",', line):
            names.append(name[1])
    if sorted(chain.from_iterable(found.values())) != sorted(kfac_xp.__all__):
        raise ValueError("the groups in `kfac_xp/__init__.py` do not hold the names of `__all__`")
    return found


def members(cls: type) -> list[str]:
    """Methods and properties that are described under a class.

    Those of its public base classes are described there; those of the others belong to it.
    """
    owners = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if not name.startswith("_"):
                owners[name] = base, value
    kinds = (FunctionType, property, classmethod, staticmethod)
    return [
        name
        for name, (owner, value) in owners.items()
        if isinstance(value, kinds)
        and owner.__module__.startswith("kfac_xp")
        and (owner is cls or id(owner) not in PUBLIC)
    ]


def description(name: str, module: ModuleType = kfac_xp) -> str:
    """The directive for one public name of a module."""
    value, path = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value):
        listed = f"\n   :members: {', '.join(members(value))}" if members(value) else ""
        return f".. autoclass:: {path}\n   :show-inheritance:{listed}"
    return f".. auto{'function' if callable(value) else 'data'}:: {path}"


def integration_page() -> str:
    """The names of each integration whose library is installed where the site is built."""
    parts = ["Integrations\n============\n\nImported by name: see :doc:`/frameworks`."]
    for library in ("torch", "jax", "autograd"):
        path = f"kfac_xp.integrations.{library}"
        parts.append(f"``{path}``\n{'-' * (len(path) + 4)}")
        if find_spec(library) is None:
            parts.append(f"Written where {library} is installed, which it was not here.")
            continue
        module = import_module(path)
        parts += [description(name, module) for name in module.__all__]
    return "\n\n".join(parts) + "\n"


def write_pages(app: Sphinx) -> None:
    """Write the generated pages; a file whose text is as it was stays untouched."""
    pages = {
        page: for_the_site(path.read_text(), path.parent, page) for path, page in FROM_ROOT.items()
    }
    names = []
    for title, listed in groups().items():
        names.append(re.sub(r"\W+", "-", title))
        heading = title[0].upper() + title[1:]
        text = "\n\n".join(description(name) for name in listed)
        pages[GENERATED / f"{names[-1]}.rst"] = f"{heading}\n{'=' * len(heading)}\n\n{text}\n"
    names.append("integrations")
    pages[GENERATED / "integrations.rst"] = integration_page()
    contents = "\n   ".join(names)
    pages[GENERATED / "api.rst"] = (
        "API reference\n=============\n\n"
        "Every public name, with its docstring; what each number is divided by:\n"
        f":doc:`/conventions`.\n\n.. toctree::\n   :maxdepth: 1\n\n   {contents}\n"
    )
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.iterdir():
        if old not in pages:
            old.unlink()
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def name_public_bases(
    app: Sphinx, name: str, obj: type, options: Any, bases: list[type | str]
) -> None:
    """Show the nearest public classes that a class derives from, and no internal ones."""
    public = [base for base in obj.__mro__[1:] if id(base) in PUBLIC]
    nearest = [b for b in public if not any(b in other.__mro__[1:] for other in public)]
    bases[:] = [f":py:class:`kfac_xp.{PUBLIC[id(base)]}`" for base in nearest] or [object]


def keep_lines(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Note the docstring of a property before napoleon sees it."""
    if what in ("attribute", "data", "property"):
        _kept[name] = list(lines)


def as_prose(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Have the first line of a property for prose: napoleon takes it for ``type: description``."""
    if name in _kept:
        kept = _kept.pop(name)
        lines[:] = NumpyDocstring(kept, app.config, app, "method", name, obj, options).lines()


def quote_shapes(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Quote shapes such as [*kernel, C, M], whose stars would begin an emphasis."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [re.sub(r"\[[^][`]*\*[^][`]*\]", r"``\g<0>``", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def require_all(app: Sphinx, env: Any) -> None:
    """Warn of public names that no page describes: an error where warnings are."""
    listed = env.get_domain("py").objects
    for name in kfac_xp.__all__:
        if f"kfac_xp.{name}" not in listed:
            logging.getLogger(__name__).warning("the API reference leaves out kfac_xp.%s", name)


# ---------------------------------------------------------------------------------------------
# Links


def for_the_site(text: str, folder: Path, page: Path) -> str:
    """Markdown without comments, and with the links of a file in `folder` as `page` needs them.

    Files outside of `docs` are offered for download, but for those that are pages. Folders have no
    page, and leave their name.
    """

    def link(match: re.Match[str]) -> str:
        mark, words, target, anchor = match.groups()
        path = (folder / target).resolve()
        path = FROM_ROOT.get(path, path)
        if path.is_dir():
            return words
        relative = relpath(path, page.parent)
        if not path.is_relative_to(DOCS) and path.suffix == ".md":
            return f"{{download}}`{words} <{relative}>`"
        return f"{mark}[{words}]({relative}{anchor or ''})"

    text = re.sub(r"^ *<!--.*?-->\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(!?)\[([^][]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)


def rewrite_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Apply `for_the_site` to the pages of `docs`; complete the contents on the first."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md" and path.parent == DOCS:
        source[0] = for_the_site(source[0], path.parent, path)
    if docname == "index":
        source[0] = with_all_pages(source[0])


def with_all_pages(text: str) -> str:
    """The first page with every page that stands in no list appended to the last one."""
    listed = set(text.split("\n"))
    missing = [path.stem for path in sorted(DOCS.glob("*.md")) if path.stem not in listed]
    before, end, after = text.rpartition("\n```")
    return "\n".join([before, *(name for name in missing if name != "index")]) + end + after


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the above with Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", rewrite_page)
    app.connect("env-get-outdated", lambda *event: ["index"])  # it lists what came since
    app.connect("autodoc-process-bases", name_public_bases)
    app.connect("autodoc-process-docstring", keep_lines, priority=400)
    app.connect("autodoc-process-docstring", as_prose, priority=600)  # napoleon's is 500
    app.connect("autodoc-process-docstring", quote_shapes, priority=700)
    app.connect("env-check-consistency", require_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
