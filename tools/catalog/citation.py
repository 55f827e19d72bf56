"""Papers as people name them: a BibTeX file, a line of authors, an id or an address. Read whole, or refused in words."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bibtexparser
from bibtexparser.middlewares import LatexDecodingMiddleware, SeparateCoAuthors, SplitNameParts
from bibtexparser.model import String

from accel_tools.catalog.papers import Identity, identity

ARXIV = re.compile(r"arxiv(?:\.org/(?:abs|pdf)/|[:.\s]+)((?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v[1-9]\d*)?)\b",
                   re.I)
VENUES = ("booktitle", "journal", "journaltitle", "eventtitle")     # fields of BibTeX and of biblatex
SUFFIX = r"(?:Jr|Sr|II|III|IV)\b\.?"
PUNCTUATION = ".,;&-'\u2019\u2010\u00b7"                              # what stands in names and between them, but for letters
JOINT = "\ue000"                                                    # a space within one word


class InputError(Exception):
    """What was given does not tell what is needed, or tells it in more than one way."""


def from_bibtex(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The facts of the one entry in a BibTeX file, LaTeX decoded, names split; and, in words, what of the file they leave out.

    Raises InputError with file and line where there are more entries or none, or one that cannot be read whole.
    """
    library = _decoded(path)
    entry = library.entries[0]
    fields = {key.lower(): value.value for key, value in entry.fields_dict.items()}
    text = {key: re.sub(r"[{}]", "", " ".join(value.split())) for key, value in fields.items() if isinstance(value, str)}
    venue_field, year_field = (next((key for key in keys if text.get(key)), "") for keys in (VENUES, ("year", "date")))
    used = {"title", "author", "doi", "url", "archiveprefix", "eprinttype", "primaryclass", venue_field, year_field}
    venue = text.get(venue_field, "")
    links = [(kind, text[kind]) for kind in ("doi", "url") if text.get(kind)]
    if text.get("eprint") and text.get("archiveprefix", text.get("eprinttype", "arxiv")).lower() == "arxiv":
        used.add("eprint")
        links.insert(0, ("eprint", text["eprint"] if ARXIV.search(text["eprint"]) else f"arxiv:{text['eprint']}"))
    elif match := ARXIV.search(f"{venue} {text.get('note', '')}"):
        links.insert(0, ("arxiv", match[1]))
    found = {
        "key": re.sub(r"[^a-z0-9_:-]", "", entry.key.lower()),
        "title": text.get("title"), "authors": [_split(name) for name in fields.get("author", [])],
        "year": text.get(year_field, "")[:4],
        "venue": "arXiv" if not venue or "arxiv" in venue.lower() else venue, **same_paper(links),
    }
    return {key: value for key, value in found.items() if value}, list(_left_out(library, text.keys() - used))


def _decoded(path: Path) -> Any:
    """The file without LaTeX, with one entry and its names split."""
    library = bibtexparser.parse_string(path.read_text(encoding="utf-8"))
    for entry in library.entries:
        for name, field in entry.fields_dict.items():
            if isinstance(field.value, str) and re.search(r'"\s*#|#\s*"', field.value):
                raise InputError(f"{path}:{entry.start_line + 1}: {name} is joined from pieces by '#'; write it out")
            if name.lower() == "author":                              # {Black Forest Labs} is one word
                field.value = re.sub(r"\{(?!\\)[^{}]*\}", lambda group: re.sub(r"\s+", JOINT, group[0]), field.value)
    for middleware in (LatexDecodingMiddleware(), SeparateCoAuthors(), SplitNameParts()):
        library = middleware.transform(library)
    if library.failed_blocks:
        block = library.failed_blocks[0]
        raise InputError(f"{path}:{(block.start_line or 0) + 1}: this BibTeX cannot be read: {block.error}")
    if len(library.entries) != 1:
        raise InputError(f"{path}: needs exactly one BibTeX entry, has {len(library.entries)}")
    return library


def _split(name: Any) -> dict[str, str | None]:
    given, family = (" ".join(words).replace(JOINT, " ") for words in (name.first, [*name.von, *name.last, *name.jr]))
    return {"given": given or None, "family": family}


def _left_out(library: Any, fields: Iterable[str]) -> Iterator[str]:
    """What of a BibTeX file nothing is made of."""
    entry = library.entries[0]
    if names := sorted(fields):
        yield f"{entry.start_line + 1}: left out: {', '.join(names)}"
    for block in library.blocks:
        used = isinstance(block, String) and re.search(rf"\b{re.escape(block.key)}\b", entry.raw)
        if block is not entry and not used:
            yield f"{block.start_line + 1}: left out: {' '.join(block.raw.split())}"


def same_paper(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Field of a paper -> its value, from names of it in any form: `doi`, `https://arxiv.org/pdf/2303.17604v2.pdf`.

    Raises InputError where two arXiv ids, DOIs, forums or addresses are none of the same paper.
    """
    found: dict[str, tuple[Identity, str, str]] = {}
    for name, written in links:
        same = identity("url", written)
        if same.kind == "url" != name:
            same = identity(name, written)
        kept = same.kind == "url" or same.kind == "doi" and written.startswith("10.")
        value = written if kept else same.name + same.version
        known, other, _ = found.setdefault(same.kind, (same, f"{name} {written!r}", value))
        if known[:2] != same[:2]:
            raise InputError(f"--{name}: {written!r} names another paper than {other}")
    return {kind: value for kind, (_, _, value) in found.items()}


def from_names(text: str) -> list[dict[str, str | None]]:
    """`A. Bee, Carl Dee and van de Weijer, Joost`: split at `;` and at `and`, else at commas between full names.

    Raises InputError where names are left out, where something is no name, or where a comma may part two names or the two
    parts of one.
    """
    text = " ".join(text.split()).strip(" ;,")
    if match := re.search(r"\bet\.? al\b\.?|\b(and )?others\b|\.\.\.|\u2026", text, re.I):
        raise InputError(f"--authors: name all authors, not {match[0]!r}")
    if strange := [c for c in text if unicodedata.category(c)[0] not in "LMZ" and c not in PUNCTUATION]:
        raise InputError(f"--authors: {strange[0]!r} is no part of a name; write the names alone, without marks and places")
    text = re.sub(rf",\s*({SUFFIX})(?=\s*(,|;|&|and\b|$))", r" \1", text)
    parts = [part.strip(" ,") for part in re.split(r"\s*;\s*(?:(?:and|&)\s+)?|,?\s+and\s+|,?\s*&\s*", text, flags=re.I)]
    if bad := [part for part in parts if not part or re.search(r"^and\b|\band$", part)]:
        raise InputError(f"--authors: a name is missing beside {bad[0] or 'a separator'!r}")
    names = [_name(name) for part in parts for name in _names(part, ";" in text)]
    if any(re.fullmatch(r"(\w\.-?)+", name["family"]) for name in names) or \
            len(names) > 1 and all(re.fullmatch(r"[A-Z]{1,2}", name["family"]) for name in names):
        raise InputError("--authors: a family name cannot be initials; write 'Given Family' or 'Family, Given'")
    return names


def _names(part: str, one: bool) -> list[str]:
    """The names in a part without `and`; `one` where it can only be one."""
    pieces = [piece.strip() for piece in part.split(",") if piece.strip()]
    if len(pieces) == 1 or len(pieces) == 2 and (one or not all(map(_whole, pieces))):
        return [", ".join(pieces)]
    if one or not all(map(_whole, pieces)):
        raise InputError(f"--authors: {part!r} can be read in several ways; part the authors with ';'")
    return pieces


def _whole(name: str) -> bool:
    """Whether this is a given name and a family name, and not a family name such as `van de Weijer`."""
    return len(re.sub(rf" {SUFFIX}$", "", name).split()) > 1 and not name[0].islower()


def _name(text: str) -> dict[str, str | None]:
    """`Weijer, Joost` or `Joost van de Weijer`: the family name begins at the first word in lower case, else it is the last,
    with the suffix behind it."""
    if "," in text:
        family, given = (part.strip() for part in text.split(",", 1))
    else:
        words = re.sub(rf" ({SUFFIX})$", rf"{JOINT}\1", text).split(" ")
        start = next((i for i, word in enumerate(words) if i and word[0].islower()), len(words) - 1)
        given, family = " ".join(words[:start]), " ".join(words[start:]).replace(JOINT, " ")
    return {"given": given or None, "family": family}
