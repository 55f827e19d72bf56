"""The schema of the catalogue: one pydantic model per kind of file, and the JSON Schema made from it."""
from __future__ import annotations

import datetime
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

SLUG = re.compile(r"[a-z][a-z0-9_]*")
UNFILLED = "FILL:"                  # marks what a contributor still has to write
TAG_AXES = ("application", "training", "criterion", "mechanism")

Kind = Literal["patch", "decoder", "module", "training", "compress", "parallel"]
Claim = Literal["macs", "memory", "passes", "quality", "none"]
Level = Literal["official", "equations", "reconstruction"]
AuthorsStyle = Literal["last_first", "first_last", "commas"]
ErratumField = Literal[
    "badge", "title", "venue", "authors", "paper", "code", "application", "training", "criterion", "mechanism",
    "badges", "placement",
]


def _one_line(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError("must be one line of printable characters without space at its ends")
    return text


def _prose(text: str) -> str:
    if not text.strip() or not text.replace("\n", "").isprintable():
        raise ValueError("must be printable text")
    return text


def _date(text: str) -> str:
    year, month, day = (*map(int, text.split("-")), 1)[:3]
    try:
        datetime.date(year, month, day)
    except ValueError as error:
        raise ValueError(f"is no date: {error}") from None
    return text


def _yaml_bool(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _setting(value: object) -> object:
    """A value of a Config as YAML means it: true, 2, 0.5, a list for a tuple, a mapping, or a word."""
    if isinstance(value, list):
        return tuple(_setting(part) for part in value)
    if isinstance(value, dict):
        return {name: _setting(part) for name, part in value.items()}
    if not isinstance(value, str) or value in ("true", "false"):
        return _yaml_bool(value)
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _word(pattern: str, what: str, schema: str | None = None) -> object:
    """A string that matches `pattern`; `what` says so in words."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"must be {what}")
        return text

    return Annotated[str, AfterValidator(check), Field(json_schema_extra={"pattern": f"^(?:{schema or pattern})$"})]


Line = Annotated[str, AfterValidator(_one_line)]
Prose = Annotated[str, AfterValidator(_prose)]
Flag = Annotated[bool, BeforeValidator(_yaml_bool)]
Setting = Annotated[Any, BeforeValidator(_setting)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Https = _word(r"https://[^\s<>\"'\\`{}|]+", "an https:// link")
Repo = _word(r"[\w.-]+/[\w.-]+|https://[^\s<>\"'\\`{}|]+", "owner/repo on GitHub or an https:// link")
# hep-th/9901001 until March 2007, then a month and a number of four digits, of five since 2015
ArxivId = _word(r"([a-z-]+(\.[A-Z]{2})?/\d\d(0[1-9]|1[0-2])\d{3}|(0[7-9]|1[0-4])(0[1-9]|1[0-2])\.\d{4}|"
                r"(1[5-9]|[2-9]\d)(0[1-9]|1[0-2])\.\d{5})(v[1-9]\d*)?",
                'a quoted arXiv id such as "2303.17604", "2404.02747v1" or "cs/0112017"')
Doi = _word(r"10\.\d{4,9}/[^\s<>\"'\\`{}|]+", "a DOI such as 10.1609/aaai.v39i9.33071")
OpenReview = _word(r"[A-Za-z0-9_-]+", "an OpenReview forum id")
Key = _word(r"[a-z][a-z0-9_:-]*", "a BibTeX key such as bolya2023tomesd")
Slug = _word(SLUG.pattern, "a slug: lower-case letters, digits and _, starting with a letter")
Term = _word(r"[a-z0-9]+(-[a-z0-9]+)*", "a vocabulary term in kebab-case")
Place = _word(r"[a-z0-9-]+/[a-z0-9-]+", "list/section, such as token-wise/image")
Since = Annotated[_word(r"\d{4}-\d{2}(-\d{2})?", "YYYY-MM-DD or YYYY-MM"), AfterValidator(_date)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class Author(Strict):
    given: Line | None = None
    family: Line

    @model_validator(mode="before")
    @classmethod
    def _no_plain_name(cls, data: Any) -> Any:
        if isinstance(data, str) and data:
            *given, family = data.split()
            parts = f"given: {' '.join(given)}, family: {family}" if given else f"family: {family}"
            raise ValueError(f"write {{{parts}}}")
        return data

    @property
    def name(self) -> str:
        return f"{self.given} {self.family}" if self.given else self.family


class Paper(Strict):
    key: Key
    title: Line
    authors: Annotated[list[Author], Field(min_length=1)]
    venue: Line                       # a venue of the vocabulary, without the year; "arXiv" if none
    year: Annotated[int, Field(ge=1990, le=2100)]
    arxiv: ArxivId | None = None
    openreview: OpenReview | None = None
    doi: Doi | None = None
    url: Https | None = None
    code: Repo | None = None
    licence: Line | None = None       # of the code
    project: Https | None = None

    @property
    def link(self) -> str | None:
        """Where to read it: arXiv, else OpenReview, else DOI, else `url`."""
        if self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        if self.openreview:
            return f"https://openreview.net/forum?id={self.openreview}"
        return f"https://doi.org/{self.doi}" if self.doi else self.url

    @property
    def code_link(self) -> str | None:
        return self.code if not self.code or self.code.startswith("https://") else f"https://github.com/{self.code}"


class Tags(Strict):
    application: Annotated[list[Term], Field(min_length=1)]
    training: Annotated[list[Term], Field(min_length=1)]
    criterion: list[Term] = []
    mechanism: Annotated[list[Term], Field(min_length=1)]


class Row(Strict):
    """One line of a list: its place, and what that list prints differently from the entry (null = left out)."""
    place: Place = Field(alias="in")
    rank: Annotated[int, Field(ge=1)]
    badge: Line | None = None
    title: Line | None = None
    venue: Line | None = None         # with the year
    paper: Https | None = None
    code: Https | None = None
    authors: Line | None = None
    authors_style: AuthorsStyle = "last_first"
    application: list[Term] | None = None
    training: list[Term] | None = None
    criterion: list[Term] | None = None
    mechanism: list[Term] | None = None


class Reported(Strict):
    """A number of the paper's own, never one of ours."""
    model: Line
    setting: Line
    metric: Line
    before: Number | None = None
    after: Number | None = None
    speedup: Annotated[Number, Field(gt=0)] | None = None
    where: Line


class Mutants(Strict):
    """Small changes of the method's code that its tests notice (tools/mutate.py)."""
    noticed: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]


class Fidelity(Strict):
    level: Level
    against: Line
    mutants: Mutants | None = None
    max_abs_diff: Annotated[Number, Field(ge=0)] | None = None
    note: Prose | None = None


class Timing(Strict):
    """A run on a model of real size with random weights, on which tools/bench.py --realistic times the method."""
    model: Slug
    steps: Annotated[int, Field(ge=1)]
    config: dict[str, Setting] = {}
    peer: Line | None = None          # a package of tools/measure/peers.py, timed beside it with the same config


class Erratum(Strict):
    """What a source list had wrong: `seed` was printed there, `corrected` is printed now (null = nothing)."""
    place: Place = Field(alias="list")
    row: Annotated[int, Field(ge=1)]
    field: ErratumField               # `placement`: why the row should not stand there; prints nothing
    seed: Line | list[Line] | None
    corrected: Line | list[Line] | None
    reason: Line
    evidence: Line


CLAIMS = ("What an implementation must be better in than the model without it: fewer multiply-accumulates, less memory, fewer "
          "passes through the model, or quality at a higher cost; none stands alone. A patch that says nothing claims macs.")


class Entry(Strict):
    name: Line
    summary: Annotated[str, Field(max_length=140), AfterValidator(_one_line)]
    kind: Kind
    since: Since                      # first public date
    pending: Flag = False             # true while there is no methods/<slug>.py
    claims: Annotated[list[Claim], Field(description=CLAIMS)] = []
    papers: Annotated[list[Paper], Field(min_length=1)]
    builds_on: list[Slug] = []
    models: Annotated[list[Term], Field(min_length=1)]
    tags: Tags
    mechanism: Prose
    rows: list[Row] = []
    reported: list[Reported] = []
    fidelity: Fidelity | None = None
    # configs that tools/bench.py measures on a bundled model, none if the list is empty; the default where it is not named
    bench: dict[Slug, list[dict[str, Setting]]] = {}
    timing: list[Timing] = []
    errata: list[Erratum] = []
    notes: Prose | None = None
    _slug: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _claims_of_a_patch(cls, data: Any) -> Any:
        return {"claims": ["macs"], **data} if isinstance(data, dict) and data.get("kind") == "patch" else data

    @property
    def slug(self) -> str:
        return self._slug


class VocabTerm(Strict):
    label: Line
    definition: Line
    badge: Line | None = None
    verb: Line | None = None          # of a kind: the name its module offers
    aliases: list[Line] = []
    parent: Term | None = None


class Axis(Strict):
    label: Line
    badge: Line | None = None
    colour: Literal["blue", "green", "brown", "purple", "orange"] | None = None
    terms: dict[Term, VocabTerm]


class Venue(Strict):
    label: Line                       # its full name
    journal: Flag = False
    aliases: list[Line] = []


class Vocab(Strict):
    method: Axis
    application: Axis
    training: Axis
    criterion: Axis
    mechanism: Axis
    model: Axis
    kind: Axis
    fidelity: Axis
    venue: dict[Line, Venue]          # by the name that entries use

    def term(self, axis: str, name: str) -> VocabTerm:
        return getattr(self, axis).terms[name]


class Section(Strict):
    id: Term
    source_rows: Annotated[int, Field(ge=0)] = 0      # how many rows its source has; those behind them are our own
    text: str                         # Markdown above the first row: heading and intro
    since: Since | None = None        # of an unlisted list: takes only what was public from then on
    mechanism: list[Term] = []        # of an unlisted list: takes only these, or what they are parents of


class TextErratum(Strict):
    """A correction outside the rows; `corrected` stands once or more in the header or the section texts."""
    seed: str
    corrected: Annotated[str, Field(min_length=1)]
    reason: Line
    evidence: Line


class ListSpec(Strict):
    title: Line
    file: _word(r"[A-Z-]+\.md", "a Markdown file name in capitals")
    axes: list[Literal[TAG_AXES]]
    link: Literal["abs", "pdf"]       # form of arXiv links
    # without a source: holds every entry that has no row of its own, in the first section that takes it, newest first
    unlisted: Flag = False
    reviewed: Since | None = None     # of an unlisted list: when the field was last gone through for what it lacks
    header: str
    sections: Annotated[list[Section], Field(min_length=1)]
    errata: list[TextErratum] = []


def json_schema(vocab: Vocab) -> str:
    """JSON Schema of an entry for editors, in draft-07 keywords, with the vocabulary filled in."""
    schema = Entry.model_json_schema(by_alias=True)
    defs = schema["$defs"]
    for axis in TAG_AXES:
        terms = {"enum": list(getattr(vocab, axis).terms)}
        defs["Tags"]["properties"][axis]["items"] = terms
        defs["Row"]["properties"][axis]["anyOf"][0]["items"] = terms
    defs["Paper"]["properties"]["venue"] = {"enum": list(vocab.venue)}
    schema["properties"]["models"]["items"] = {"enum": list(vocab.model.terms)}
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
