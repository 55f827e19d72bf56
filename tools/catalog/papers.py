"""Rules about papers: none stands twice under whatever name, venues are those of the vocabulary, all authors are named."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

from accel_tools.catalog.entries import Catalog, allowed, entry_file
from accel_tools.catalog.schema import Paper, Vocab
from accel_tools.catalog.yaml_lines import Problem

HOST = re.compile(r"^(?:https?://)?(?:www\.|export\.|dx\.)?(?=[\w-]+(?:\.[\w-]+)+(?:[/:?#]|$))", re.I)     # may be left out
ARXIV = re.compile(r"(?:(?:ar5iv\.(?:labs\.)?)?arxiv\.org/(?:abs|pdf|html|format)/|(?:doi\.org/|doi:\s*)?10\.48550/arxiv\.|"
                   r"arxiv:\s*)(.+?)(?:\.pdf)?", re.I)
DOI = re.compile(r"(?:doi\.org/|doi:\s*)(10\..+)", re.I)
FORUM = re.compile(r"openreview\.net/(?:forum|pdf|attachment)\?(?:.*&)?id=([\w-]+).*", re.I)
FILLER = re.compile(r"\b(proceedings|proc|advances|annual|international|conference|of|the|on|in|and|for|ieee|cvf|acm|\d+\w*|"
                    r"twenty|thirty|forty|first|second|third|(four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie)th)\b")


class Identity(NamedTuple):
    """Which paper something names: an arXiv id without its version, a DOI, an OpenReview forum or another address."""

    kind: str
    name: str
    version: str = ""


def identity(kind: str, value: str) -> Identity:
    """The same for every way to write it: an arXiv id may stand as DOI or as address, with the subject class or without; a DOI
    in any case; an address with any scheme, `www.`, a last `/` or a `#` part."""
    address = HOST.sub("", value.strip()).partition("#")[0].rstrip("/")
    if match := ARXIV.fullmatch(address):
        kind, value = "arxiv", match[1].partition("?")[0].rstrip("/").removesuffix(".pdf")
    elif match := DOI.fullmatch(unquote(address)):
        kind, value = "doi", match[1]
    elif match := FORUM.fullmatch(address):
        kind, value = "openreview", match[1]
    elif kind == "url":
        value = address
    if kind == "arxiv":
        archive, name, version = re.fullmatch(r"([a-z-]+(?=[./]))?(.*?)(v\d+)?", value.lower()).groups("")
        return Identity("arxiv", archive + re.sub(r"^\.\w\w/", "/", name), version)
    return Identity(kind, value if kind == "openreview" else value.lower().rstrip("/"))


def venue_named(vocab: Vocab, text: str) -> str | None:
    """The venue that a name, an alias or the title of its proceedings means, with or without a year."""
    def plain(words: str) -> str:
        return " ".join(FILLER.sub(" ", re.sub(r"[^a-z0-9]+", " ", words.lower())).split())

    names = {plain(form): name for name, venue in vocab.venue.items() for form in (name, venue.label, *venue.aliases)}
    found = [names.get(plain(part)) for part in (text, re.sub(r"\(.*?\)", " ", text), *re.findall(r"\((.*?)\)", text))]
    return next(filter(None, found), None)


def paper_problems(catalog: Catalog) -> Iterator[Problem]:
    places: dict[tuple[str, str], list[tuple[tuple[str, int], str, str, str]]] = {}     # name -> (paper, value, version, place)
    for slug, entry in catalog.entries.items():
        for i, paper in enumerate(entry.papers):
            for kind in ("key", "arxiv", "openreview", "doi", "url"):
                if (value := getattr(paper, kind)) is None:
                    continue
                found, line = identity(kind, value), catalog.line(slug, "papers", i, kind)
                others = places.setdefault(found[:2], [])
                for other, written, version, place in others:
                    if other != (slug, i) and (found.version == version or not found.version or not version):
                        yield Problem(entry_file(slug), line, f"papers.{i}.{kind}: {value!r} is already used at {place}"
                                                              + _difference(written, value, found))
                        break
                others.append(((slug, i), value, found.version, f"{entry_file(slug)}:{line}"))
            yield from _paper_problems(catalog, slug, i, paper)


def _difference(written: str, value: str, found: Identity) -> str:
    if written == value:
        return ""
    rule = "; two entries may share an arXiv id only with different versions (v1, v2)" if found.kind == "arxiv" else ""
    return f" as {written!r}{rule}"


def _paper_problems(catalog: Catalog, slug: str, i: int, paper: Paper) -> Iterator[Problem]:
    file = entry_file(slug)
    for j, author in enumerate(paper.authors):
        if author.family.lower() in ("others", "et al.", "et al"):
            yield Problem(file, catalog.line(slug, "papers", i, "authors", j),
                          f"papers.{i}.authors.{j}: name all authors, not {author.family!r}")
    if not paper.link:
        yield Problem(file, catalog.line(slug, "papers", i), f"papers.{i}: needs one of arxiv, openreview, doi, url")
    if paper.venue not in catalog.vocab.venue:
        meant = venue_named(catalog.vocab, paper.venue)
        said = f"write {meant!r}" if meant else f"{allowed(paper.venue, list(catalog.vocab.venue))} A new one is added there"
        yield Problem(file, catalog.line(slug, "papers", i, "venue"),
                      f"papers.{i}.venue: {paper.venue!r} is no venue of catalog/vocab.yaml; {said}")


def twins(catalog: Catalog) -> Iterator[Problem]:
    """Papers of equal title and first author: a warning, since a long version may be a paper of its own."""
    seen: dict[tuple[str, str], str] = {}
    for slug, entry in catalog.entries.items():
        for i, paper in enumerate(entry.papers):
            mark = (_letters(paper.title), _letters(paper.authors[0].family.split()[-1]))      # with `van` or without
            line = catalog.line(slug, "papers", i, "title")
            if mark in seen:
                yield Problem(entry_file(slug), line, f"papers.{i}: title and first author are those of {seen[mark]}; "
                                                      "is it the same paper?", "warning")
            seen.setdefault(mark, f"{entry_file(slug)}:{line}")


def _letters(text: str) -> str:
    """Letters and digits alone, in lower case, without accents."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", text).casefold())
