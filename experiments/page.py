"""One self-contained HTML page out of small pieces: no script, no request, pictures inside.

    write_report(Path("report.html"), title="a run", lead="It ended.", sections=[Section("Result", [Text("Good.")])])

Everything that a piece is given is text and is escaped. The page follows the reader's choice of light and dark, is
readable on a phone, and prints.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .files import write_atomically
from .places import Place


@runtime_checkable
class Piece(Protocol):
    """A part of a section; one of your own needs this method alone."""

    def html(self) -> str:
        """The piece as HTML, with everything that came from outside escaped."""
        ...


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Sample:
    """Text as it is, line by line: what a model wrote, a command, a configuration."""

    text: str
    caption: str = ""

    def html(self) -> str:
        return _figure(f'<pre tabindex="0">{html.escape(self.text)}</pre>', self.caption)


@dataclass(frozen=True)
class Figures:
    """A few numbers in large type: (number, what it is)."""

    entries: Sequence[tuple[str, str]]

    def html(self) -> str:
        tiles = [f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(n)}</dd></div>" for n, what in self.entries]
        return f'<dl class="figures">{"".join(tiles)}</dl>'


@dataclass(frozen=True)
class Table:
    """Rows under columns, the first of which names the rows. Other columns stand flush right where they hold numbers.
    An int gets thousands separators, a float four significant digits, and text stays as it is."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    caption: str = ""
    total: bool = False
    """Whether the last row is the sum of the others."""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells, {list(row)}; the columns are {list(self.columns)}")

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[_as_text(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, and nothing else; the first never does, for it names the rows."""
        columns = zip(*self.cells, strict=True) if self.rows else [["text"]] * len(self.columns)
        return [place > 0 and all(map(_is_number, column)) for place, column in enumerate(columns)]

    def html(self) -> str:
        styles = [' class="number"' if numeric else "" for numeric in self.numeric]

        def line(cells: Sequence[str], tag: str, style: str = "") -> str:
            marked = [f"<{tag}{s}>{html.escape(cell)}</{tag}>" for cell, s in zip(cells, styles, strict=True)]
            return f"<tr{style}>{''.join(marked)}</tr>"

        lines = [line(row, "td") for row in self.cells]
        if self.total and lines:
            lines[-1] = line(self.cells[-1], "td", ' class="total"')
        head = line(self.columns, "th") if any(self.columns) else ""
        table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
        return _figure(f'<div class="wide" tabindex="0">{table}</div>', self.caption)


@dataclass(frozen=True)
class Picture:
    """A PNG file, embedded."""

    file: Place
    caption: str = ""

    def html(self) -> str:
        data = self.file.read_bytes()
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"{self.file}: it is no PNG; a picture in a report must be one")
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        image = f'<img alt="{html.escape(self.caption or self.file.stem)}" src="{source}">'
        return _figure(f'<div class="wide" tabindex="0">{image}</div>', self.caption)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    pieces: Sequence[Piece]


def write_report(file: Place, *, title: str, lead: str, sections: Sequence[Section]) -> Place:
    """Write a page, whole or not at all.

    Args:
        file: the HTML file to write.
        title: the heading of the page.
        lead: a sentence or two below it: what came out.
        sections: the rest, in order.

    Returns:
        `file`.

    Raises:
        ValueError: a picture is no PNG.
        OSError: a picture cannot be read.
    """
    body = "\n".join(
        f"<section>\n<h2>{html.escape(section.title)}</h2>\n"
        + "\n".join(piece.html() for piece in section.pieces)
        + "\n</section>"
        for section in sections
    )
    page = _PAGE.format(title=html.escape(title), lead=html.escape(lead), style=_STYLE, body=body)
    write_atomically(file, page)
    return file


def _figure(content: str, caption: str) -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{below}</figure>"


def _as_text(cell: str | int | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"|–|nan|[-+]?[\d.,]+(e[-+]\d+)?\s?%?", text) is not None


# The policy makes the browser itself hold that nothing is fetched and nothing runs.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{lead}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""

# Plots are black on white. On a dark page their lightness is turned round and their hues are kept, which also turns
# the white middle of a diverging scale into the page's own.
_STYLE = """
:root { --page: #fff; --ink: #22262b; --quiet: #68707a; --line: #e3e6ea; --soft: #f5f6f8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #161616; --ink: #e6e7e9; --quiet: #9a9fa6; --line: #313336; --soft: #1f2022; }
  img { filter: invert(.914) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 50rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: .6rem 0 0; font-size: 1.1rem; color: var(--quiet); }
section { margin-top: 2.75rem; }
h2 { margin: 0 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: 1.2rem; line-height: 1.3; }
p { margin: .75rem 0; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figcaption { margin-top: .5rem; font-size: .875rem; color: var(--quiet); }
img { display: block; width: 100%; min-width: 36rem; height: auto; } /* a phone scrolls it, or could not read it */
pre { margin: 0; padding: .9rem 1rem; background: var(--soft); border-radius: 6px; overflow-x: auto;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: baseline; }
th { font-weight: 500; color: var(--quiet); }
td { overflow-wrap: break-word; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; }
td:first-child { white-space: nowrap; overflow-wrap: normal; }
.total td { font-weight: 600; border-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 45%), 1fr)); gap: 1.25rem;
  margin: 1rem 0; }
dd { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
dt { font-size: .875rem; color: var(--quiet); }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; print-color-adjust: exact; }
  img { min-width: 0; }
  figure, tr, .figures { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .wide { overflow: visible; }
  td { overflow-wrap: anywhere; }
}
"""
