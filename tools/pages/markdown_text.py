"""Text and numbers for Markdown pages: what goes in is what a reader sees, whatever characters it holds."""
from __future__ import annotations

import re

UNITS = {"count": (1000, ["", " k", " M", " G", " T"]), "bytes": (1024, [" B", " KiB", " MiB", " GiB", " TiB"])}


def md(text: object) -> str:
    """Plain text as inline Markdown that shows exactly that text, in a paragraph, a heading or a table cell."""
    escaped = re.sub(r"[\\`*_{}\[\]<>|~^&]", lambda m: f"&#{ord(m[0])};", " ".join(str(text).split()))
    escaped = re.sub(r"^[-+=#!?:]", lambda m: f"&#{ord(m[0])};", escaped)
    return re.sub(r"^(\d+)\.(?=\s)", r"\1&#46;", escaped)


def code(text: object) -> str:
    """Plain text as inline code, safe in a table cell."""
    return f"<code>{md(text)}</code>" if str(text) else ""


def prose(text: str) -> str:
    """Paragraphs of plain text in which `backticks` mark code."""
    def inline(part: str) -> str:
        pieces = re.split(r"`([^`]+)`", " ".join(part.split()))
        return "".join(code(piece) if i % 2 else _keep_ends(piece) for i, piece in enumerate(pieces))

    return "\n\n".join(inline(part) for part in re.split(r"\n\s*\n", text.strip()))


def _keep_ends(piece: str) -> str:
    lead, tail = " " * piece.startswith(" "), " " * (len(piece) > 1 and piece.endswith(" "))
    return lead + md(piece) + tail


def fence(text: str, language: str = "", options: str = "") -> str:
    """A fenced block that the text cannot end early."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    head = f"{ticks}{{ .{language} {options} }}" if options else ticks + language
    return f"{head}\n{text.rstrip()}\n{ticks}"


def number(value: object, form: str) -> str:
    """A value in its unit: `form` is plain, seconds, times, percent, count or bytes. Lists, dicts and words go too."""
    if isinstance(value, list | tuple):
        return " to ".join(number(part, form) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {number(part, form)}" for key, part in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if form == "seconds":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if form == "percent":
        return f"{100 * value:.2f} %"
    if form == "times":
        return f"{value:.2f}×"
    if form in UNITS:
        base, units = UNITS[form]
        size = 0
        while abs(value) >= base and size < len(units) - 1:
            value, size = value / base, size + 1
        return f"{value:.3g}{units[size]}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
