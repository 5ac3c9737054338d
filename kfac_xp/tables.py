"""Small tables of words, as aligned text and as plain HTML."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows of words under a header. ``str(table)`` is aligned text.

    In a notebook it is an HTML table, without styles or scripts.

    Parameters
    ----------
    rows
        Of equal length.
    header
        Words above the columns; empty for none.
    title
        A line above the table; empty for none.
    numbers
        Which columns are numbers, to be aligned on the right.
    last
        How many of the rows are sums, to be set apart at the bottom.
    """

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    title: str = ""
    numbers: Collection[int] = ()
    last: int = 0

    def __str__(self) -> str:
        lines = [self.header, *self.rows] if self.header else list(self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [self.title] if self.title else []
        texts += [self._aligned(line, widths) for line in lines]
        if self.last:
            rule = "  ".join("-" * width for width in widths)
            texts.insert(len(texts) - self.last, rule)
        return "\n".join(texts)

    def _repr_html_(self) -> str:
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        head = f"<thead>{_html_row('th', self.header)}</thead>" if self.header else ""
        body = "".join(_html_row("td", row) for row in self.rows)
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            f"{word:>{width}}" if i in self.numbers else f"{word:<{width}}"
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def bytes_words(size: int) -> str:
    """A number of bytes in words of three digits, such as "1.5 MB": units are powers of 1000."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds_words(seconds: float) -> str:
    """A time in words, such as "1.50 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} us"
