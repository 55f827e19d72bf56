"""The built site: links resolve, nothing comes from elsewhere, the table works, phone and screen reader too."""
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

PAGES = ["/", "/methods/", "/methods/tome/", "/models/", "/models/unet/", "/measured/", "/measured/dit/", "/corrections/",
         "/tags/mechanism/token-merging/"]
# Findings that belong to the theme: (rule, start of the selector).
THEME = {("aria-dialog-name", ".md-search"), ("landmark-unique", "nav")}


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.resources = set(), [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("href") and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.resources.append(attrs["href"])
        elif attrs.get("src"):
            self.resources.append(attrs["src"])


@pytest.fixture(scope="module")
def parsed(built):
    """URL path -> parsed page. The 404 page is left out: mkdocs gives it links from the root of a server."""
    found = {}
    for file in built.rglob("*.html"):
        page = _Page()
        page.feed(file.read_text(encoding="utf-8"))
        found["/" + file.relative_to(built).as_posix().removesuffix("index.html")] = page
    del found["/404.html"]
    return found


def test_every_internal_link_and_anchor_resolves(built, parsed):
    dead = []
    for path, page in parsed.items():
        for href in page.links + page.resources:
            parts = urlsplit(urljoin("http://site" + path, href))
            if parts.netloc != "site":
                continue
            target, anchor = unquote(parts.path), unquote(parts.fragment)
            if target in parsed:
                if anchor and anchor not in parsed[target].ids:
                    dead.append(f"{path}: {href} (no such anchor)")
            elif not (built / target.lstrip("/")).is_file():
                dead.append(f"{path}: {href}")
    assert not dead


def test_nothing_is_loaded_from_another_host(parsed):
    assert not [(path, url) for path, page in parsed.items() for url in page.resources if urlsplit(url).netloc]


def test_exports_are_part_of_the_site(built):
    assert all((built / f"catalog.{kind}").stat().st_size for kind in ("json", "csv", "bib"))


def test_table_filters_and_keeps_the_filter_in_the_address(visit):
    page = visit("/methods/")
    rows = page.locator(".finder-table tbody tr:visible")
    everything = rows.count()
    page.locator("select[name=mechanism]").select_option("token-merging")
    merging = rows.count()
    assert 0 < merging < everything
    expect(page.locator(".finder-count")).to_have_text(f"{merging} of {everything} methods")
    page.locator("input[name=text]").fill("stable diffusion")
    assert 0 < rows.count() < merging
    slugs = rows.evaluate_all("rows => rows.map(row => row.dataset.slug)")
    assert "tome" in slugs and "mechanism=token-merging" in page.url
    page.reload()
    assert rows.evaluate_all("rows => rows.map(row => row.dataset.slug)") == slugs
    assert page.locator("select[name=mechanism]").input_value() == "token-merging"
    page.locator(".finder-form button").click()
    expect(rows).to_have_count(everything)
    assert "?" not in page.url


def test_a_broad_term_finds_the_narrower_ones(visit):
    page = visit("/methods/?mechanism=token-compression")
    slugs = page.locator(".finder-table tbody tr:visible").evaluate_all("rows => rows.map(row => row.dataset.slug)")
    assert "tome" in slugs and "todo" in slugs and "fora" not in slugs


def test_no_match_offers_a_way_back(visit):
    page = visit("/methods/?text=nothing-is-called-like-this")
    expect(page.locator(".finder-count")).to_contain_text("0 of")
    page.get_by_role("button", name="Clear all filters").click()
    assert page.locator(".finder-table tbody tr:visible").count() > 1


def test_table_sorts_both_ways_and_says_so(visit):
    page = visit("/methods/")
    rows = page.locator(".finder-table tbody tr")
    head = page.locator("th[data-sort=name]")
    names = "rows => rows.map(row => row.dataset.name)"
    head.get_by_role("button").click()
    up = rows.evaluate_all(names)
    assert head.get_attribute("aria-sort") == "ascending" and page.locator("th[aria-sort]").count() == 1
    head.get_by_role("button").click()
    assert rows.evaluate_all(names) == up[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    page.reload()
    assert rows.evaluate_all(names) == up[::-1]
    order = page.evaluate("names => names.every((n, i) => !i || names[i - 1].localeCompare(n) <= 0)", up)
    assert order


def test_a_few_can_be_picked_compared_and_cited(visit):
    page = visit("/methods/")
    rows = page.locator(".finder-table tbody tr:visible")
    page.get_by_label("Pick ToMe", exact=True).check()
    expect(page.locator(".pick-only")).to_be_disabled()
    page.get_by_label("Pick FORA", exact=True).check()
    page.locator(".pick-only").click()
    expect(rows).to_have_count(2)
    assert "with fora.apply(pipe), tome.apply(pipe):" in page.locator(".pick-code").inner_text()
    page.reload()
    expect(rows).to_have_count(2)
    page.get_by_text("BibTeX of the picked").click()
    expect(page.locator(".pick-bibtex")).to_contain_text("Token Merging for Fast Stable Diffusion")
    assert page.locator(".pick-bibtex").inner_text().count("@") == 2
    page.locator(".pick-none").click()
    assert rows.count() > 50 and "?" not in page.url


def test_table_begins_with_the_newest_and_filters_by_verdict(visit):
    page = visit("/methods/")
    dates = page.locator(".finder-table tbody tr").evaluate_all("rows => rows.map(row => row.dataset.date)")
    assert dates == sorted(dates, reverse=True)
    page.locator("select[name=verdict]").select_option("better")
    shown = page.locator(".finder-table tbody tr:visible").evaluate_all("rows => rows.map(row => row.dataset.verdict)")
    assert shown and set(shown) == {"better"}


def test_a_family_is_two_clicks_from_home(visit):
    """With what to try first and the line that applies it."""
    page = visit("/")
    page.get_by_role("link", name="Which method for my model").first.click()
    page.locator("#families ~ ul").get_by_role("link", name="Wan 2.1", exact=True).click()
    expect(page.get_by_role("heading", name="Try first")).to_be_in_viewport()
    assert page.locator("pre code").first.inner_text().startswith("from methods import ")


def test_first_principles_of_a_mechanism_are_one_click_from_home(visit):
    page = visit("/")
    page.locator(".cloud a", has_text="Token merging").click()
    expect(page.get_by_role("heading", name="From first principles")).to_be_in_viewport()
    assert page.get_by_role("heading", name="In time").count() == 1


def test_table_works_without_scripts(visit):
    page = visit("/methods/?mechanism=token-merging", java_script_enabled=False)
    assert page.locator("form.finder-form").is_hidden()
    assert page.locator(".finder-table tbody tr:visible").count() > 50


def test_search_finds_a_method(visit):
    page = visit("/")
    box, found = page.locator(".md-search__input"), page.locator(".md-search-result__link[href*='methods/tome/']").first
    box.click()
    for _ in range(15):                     # the index loads in a worker, which misses what is typed before it is there
        box.fill("")
        box.press_sequentially("tome")
        page.wait_for_timeout(1000)
        if found.count():
            break
    expect(found).to_be_attached()


def test_map_leads_to_the_line_of_the_source(visit):
    page = visit("/methods/tome/")
    page.get_by_role("link", name="apply", exact=True).click()
    anchor = page.url.split("#")[1]
    expect(page.locator(f'[id="{anchor}"]')).to_be_in_viewport()


@pytest.mark.parametrize("path", PAGES)
def test_phone_width_has_no_horizontal_overflow(visit, path):
    page = visit(path, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("path, scheme", [*((p, "light") for p in PAGES), ("/", "dark"), ("/methods/tome/", "dark")])
def test_accessibility(visit, path, scheme):
    page = visit(path, color_scheme=scheme, reduced_motion="reduce", viewport={"width": 1280, "height": 900})
    page.wait_for_timeout(300)                            # hover and palette transitions of the theme
    found = [(violation["id"], node["target"][0], node.get("failureSummary", ""))
             for violation in Axe().run(page).response["violations"] for node in violation["nodes"]]
    assert not [(rule, target, why) for rule, target, why in found
                if not any(rule == allowed and target.startswith(start) for allowed, start in THEME)]


def test_the_third_list_is_newest_first_and_says_what_is_here(visit):
    page = visit("/lists/since-2025/")
    table = page.locator("table").first
    ranks = [int(text) for text in table.locator("tbody tr td:first-child").all_inner_texts()]
    assert ranks == list(range(len(ranks), 0, -1)) and len(ranks) > 10
    assert {"implemented", "planned"} <= set(table.locator("tbody tr td:last-child").all_inner_texts())
    expect(page.get_by_text("The field was last gone through for it in 20")).to_be_visible()
    assert not page.locator("h2", has_text="Other").count()


def test_classes_without_a_row_are_listed_with_the_reason(visit):
    page = visit("/models/")
    expect(page.get_by_role("heading", name="Model classes without a row")).to_have_count(1)
    assert page.locator("td code", has_text="QwenImage21Transformer2DModel").count() == 1
