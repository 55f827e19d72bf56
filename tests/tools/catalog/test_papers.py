"""Papers: the same one is met under whatever name, venues are known by any, and bad names of methods are refused."""
import pytest

import methods
from accel_tools.catalog import ROOT, CatalogError, load
from accel_tools.catalog.papers import identity, venue_named
from accel_tools.catalog.rules import slug_problem
from accel_tools.catalog.schema import Author, Paper
from accel_tools.check_catalog import check

FIRST, ENTRY = "catalog/entries/method_1.yaml", "catalog/entries/method_2.yaml"
VOCAB = load().vocab


def errors(root) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        load(root)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("same", [
    [("arxiv", "2303.17604"), ("doi", "10.48550/arXiv.2303.17604"), ("url", "https://arxiv.org/abs/2303.17604"),
     ("url", "https://www.arxiv.org/pdf/2303.17604.pdf"), ("url", "https://doi.org/10.48550/ARXIV.2303.17604"),
     ("url", "http://arxiv.org/abs/2303.17604/"), ("url", "arxiv.org/abs/2303.17604?context=cs#S1"),
     ("url", "https://ar5iv.labs.arxiv.org/html/2303.17604"), ("doi", "doi:10.48550/arXiv.2303.17604")],
    [("arxiv", "2303.17604v2"), ("url", "https://arxiv.org/pdf/2303.17604v2.pdf"), ("doi", "10.48550/arxiv.2303.17604v2")],
    [("arxiv", "cs/0112017"), ("url", "https://arxiv.org/abs/cs/0112017")],
    [("arxiv", "math.GT/0309136"), ("arxiv", "math/0309136"), ("url", "https://arxiv.org/abs/math.GT/0309136")],
    [("doi", "10.1609/aaai.v39i9.33071"), ("doi", "10.1609/AAAI.V39I9.33071"),
     ("url", "https://doi.org/10.1609/aaai.v39i9.33071"), ("url", "https://dx.doi.org/10.1609%2Faaai.v39i9.33071")],
    [("openreview", "Jt1gGIumJo"), ("url", "https://openreview.net/forum?id=Jt1gGIumJo"),
     ("url", "https://openreview.net/pdf?id=Jt1gGIumJo"), ("url", "https://openreview.net/forum?noteId=a&id=Jt1gGIumJo"),
     ("url", "http://www.openreview.net/forum?id=Jt1gGIumJo#discussion")],
    [("url", "https://a.org/X/"), ("url", "https://a.org/x"), ("url", "http://www.a.org/x#top")],
    [("url", "https://a.org"), ("url", "http://www.a.org/")],
])
def test_one_paper_by_any_name(same):
    assert len({identity(kind, value) for kind, value in same}) == 1


def test_other_papers_are_others():
    assert identity("arxiv", "2303.17604v2") == ("arxiv", "2303.17604", "v2")
    assert identity("arxiv", "solv-int/9701001v1") == ("arxiv", "solv-int/9701001", "v1")
    assert identity("openreview", "abc") != identity("openreview", "ABC")
    assert identity("doi", "10.1/v2") == ("doi", "10.1/v2", "")
    assert len({identity("url", f"https://a.org/x{query}") for query in ("", "?id=1", "?id=2", "/y")}) == 4


@pytest.mark.parametrize("second", ["doi: 10.48550/ARXIV.2001.10001", "url: https://arxiv.org/pdf/2001.10001v3",
                                    'arxiv: "2001.10001"'])
def test_a_paper_stands_once(toy, edit, second):
    line = edit(ENTRY, 'arxiv: "2001.10002"', second)
    value = second.split(": ")[1].strip('"')
    [found] = errors(toy)
    assert found.startswith(f"{ENTRY}:{line}: papers.0.{second.split(':')[0]}: '{value}' is already used at {FIRST}:")
    assert ("as '2001.10001'" in found) == (value != "2001.10001")


def test_one_entry_may_name_its_paper_twice(toy, edit):
    edit(ENTRY, 'arxiv: "2001.10002"', 'arxiv: "2001.10002"\n    doi: 10.48550/arXiv.2001.10002')
    load(toy)


def test_a_paper_without_a_version_is_every_version(toy, edit):
    edit(ENTRY, 'arxiv: "2001.10002"', 'arxiv: "2001.10001v2"')
    [found] = errors(toy)
    assert found.endswith("as '2001.10001'; two entries may share an arXiv id only with different versions (v1, v2)")


@pytest.mark.parametrize(("title", "family", "warned"), [
    ("Method 1: A title", "family1", True), ("M\u00e9thod 1 - a Title", "van F\u00e0mily1", True),
    ("Method 1: A title", "Family2", False), ("Method 1b: A title", "family1", False)])
def test_equal_title_and_first_author_are_a_warning(toy, edit, title, family, warned):
    edit(ENTRY, 'Method 2: a Title', title)
    edit("methods/method_2.py", 'Method 2: a Title', title)
    edit(ENTRY, "{given: Given, family: Family2}", f"{{given: G., family: {family}}}")
    edit("methods/method_2.py", "Given Family2", f"G. {family}")
    check(toy, fix=True)
    problems = check(toy)[0]
    assert [problem.level for problem in problems] == ["warning"] * warned
    assert not warned or f"title and first author are those of {FIRST}:" in problems[0].message


@pytest.mark.parametrize("arxiv", ["2015.0001", "1412.00001", "1501.0001", "2313.00001", "0601.0001", "math/0013001", "99.1"])
def test_what_is_no_arxiv_id(arxiv):
    with pytest.raises(ValueError, match="must be a quoted arXiv id"):
        Paper(key="k", title="T", authors=[Author(family="A")], venue="arXiv", year=2024, arxiv=arxiv)


@pytest.mark.parametrize("arxiv", ["0704.0001", "1412.9999v2", "1501.00001", "2303.17604v3", "cs/0112017", "hep-th/9901001",
                                   "math.AG/0309136v1"])
def test_all_forms_of_arxiv_ids(arxiv):
    paper = Paper(key="k", title="T", authors=[Author(family="A")], venue="arXiv", year=2024, arxiv=arxiv)
    assert paper.link == f"https://arxiv.org/abs/{arxiv}"


@pytest.mark.parametrize(("text", "venue"), [
    ("CVPR", "CVPR"), ("CVPR 2025", "CVPR"), ("cvpr'25", "CVPR"), ("NIPS", "NeurIPS"), ("ACM Trans. Graph.", "ACM TOG"),
    ("Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition", "CVPR"),
    ("2024 IEEE/CVF International Conference on Computer Vision (ICCV)", "ICCV"),
    ("Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops", "CVPRW"),
    ("Advances in Neural Information Processing Systems 37", "NeurIPS"), ("CoRR", "arXiv"),
    ("The Thirteenth International Conference on Learning Representations", "ICLR"),
    ("The Thirty-eighth Annual Conference on Neural Information Processing Systems", "NeurIPS"), ("CPVR", None), ("", None),
])
def test_venues_by_their_other_names(text, venue):
    assert venue_named(VOCAB, text) == venue


@pytest.mark.parametrize(("venue", "said"), [
    ("CVPR 2025", "'CVPR 2025' is no venue of catalog/vocab.yaml; write 'CVPR'"),
    ("CPVR", "'CPVR' is no venue of catalog/vocab.yaml; did you mean 'CVPR'?"),
    ("Proceedings of Nothing", "is no venue of catalog/vocab.yaml; allowed: AAAI, ACL,"),
])
def test_a_venue_is_one_of_the_vocabulary(toy, edit, venue, said):
    line = edit(ENTRY, "venue: arXiv", f"venue: {venue}")
    [found] = errors(toy)
    assert found.startswith(f"{ENTRY}:{line}: papers.0.venue: ") and said in found


@pytest.mark.parametrize(("name", "said"), [
    ("Feng Liu", "write {given: Feng, family: Liu}"), ("Ann B. Cee", "write {given: Ann B., family: Cee}"),
    ("Meta", "write {family: Meta}")])
def test_an_author_as_a_string_is_told_how_to_write_it(toy, edit, name, said):
    line = edit(ENTRY, "{given: Given, family: Family2}", name)
    assert errors(toy) == [f"{ENTRY}:{line}: papers.0.authors.0: {said}; got {name!r}"]


PACKAGE = """from x import card, y as tiny

SIZES: dict = {}
small, large = 1, 2


def draw():
    inner = 1
"""


def named(root, slug) -> list[str]:
    """What is said of the file name once the second method has this slug."""
    (root / "methods/__init__.py").write_text(PACKAGE)
    (root / ENTRY).rename(root / f"catalog/entries/{slug}.yaml")
    start = f"catalog/entries/{slug}.yaml:1: file name must be <slug>.yaml; "
    return [str(problem)[len(start):] for problem in check(root)[0] if str(problem).startswith(start)]


@pytest.mark.parametrize(("slug", "said"), [
    ("lambda", "'lambda' is a word of Python, so that `from methods import lambda` cannot be written"),
    ("match", "is a word of Python"), ("case", "is a word of Python"), ("filter", "is a builtin of Python"),
    ("token", "is a module of Python's library"), ("a__B", "must be lower-case letters"),
    *((slug, f"{slug!r} is a name of the package `methods` already, which a module would hide")
      for slug in ("tiny", "card", "draw", "small", "large"))])
def test_names_that_a_method_cannot_have(toy, slug, said):
    [found] = named(toy, slug)
    assert said in found


@pytest.mark.parametrize("slug", ["y", "x", "inner", "lambda_dit", "tiny_dit"])
def test_names_that_only_look_like_those(toy, slug):
    assert named(toy, slug) == []


def test_every_public_name_of_the_package_is_kept_from_methods():
    assert {"tiny", "card", "weights"} <= set(methods.__all__)
    for name in methods.__all__:
        assert slug_problem(name, ROOT), name
