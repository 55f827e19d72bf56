"""Rendering: fresh on the real catalogue, escaped, atomic, and silent on a broken catalogue."""
import os
import re
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_tools import render_readme
from accel_tools.catalog import load
from accel_tools.catalog.rows import badge_of, link, markdown, shield
from accel_tools.pages.lists import BEGIN, END, MarkerError, render_list
from accel_tools.pages.lists import render_readme as render_part
from accel_tools.pages.text import write

GENERATED = ["README.md", "TOKEN-WISE.md", "TRAINING-FREE.md", "catalog/schema.json"]


def run(root, *flags) -> int:
    return render_readme.main(["--root", str(root), *flags])


def state(root) -> dict:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_real_lists_are_fresh(capsys):
    assert render_readme.main(["--check"]) == 0, capsys.readouterr().out


def test_second_run_changes_nothing(toy, capsys):
    before = state(toy)
    assert run(toy) == 0 and "nothing to do" in capsys.readouterr().out
    assert state(toy) == before


def test_check_shows_a_diff_and_writes_nothing(toy, edit, capsys):
    edit("catalog/entries/method_2.yaml", "name: Method 2", "name: Renamed")
    before = state(toy)
    assert run(toy, "--check") == 1
    out = capsys.readouterr().out
    assert "-" in out and "+| Renamed |" in out and "stale: TOKEN-WISE.md" in out
    assert state(toy) == before
    assert run(toy) == 0 and run(toy, "--check") == 0


def test_one_list_only(toy, edit):
    edit("catalog/entries/method_2.yaml", "name: Method 2", "name: Renamed")
    before = {name: (toy / name).read_text() for name in GENERATED}
    assert run(toy, "--list", "token-wise") == 0
    assert [name for name in GENERATED if (toy / name).read_text() != before[name]] == ["TOKEN-WISE.md"]


def test_unknown_list_is_refused(toy):
    with pytest.raises(SystemExit):
        run(toy, "--list", "video")


def test_nothing_is_written_while_an_entry_is_wrong(toy, edit, capsys):
    edit("catalog/entries/method_1.yaml", "name: Method 1", "name: Renamed")
    edit("catalog/entries/method_2.yaml", "kind: patch", "kind: pach")
    before = state(toy)
    assert run(toy) == 1
    assert "catalog/entries/method_2.yaml:3: kind:" in capsys.readouterr().err
    assert state(toy) == before


def test_an_erratum_must_name_what_is_printed(toy, edit, capsys):
    edit("catalog/entries/method_2.yaml", "corrected: arXiv 2024", "corrected: ICLR 2025")
    assert run(toy) == 1
    assert "venue is printed as 'arXiv 2024', not as 'ICLR 2025'" in capsys.readouterr().err


def test_as_seed_takes_errata_back(toy):
    catalog = load(toy)
    assert ", arXiv 2024." in render_list(catalog, "token-wise")
    assert ", arXiv 2023." in render_list(catalog, "token-wise", as_seed=True)
    assert "arXiv 2023" not in render_list(catalog, "training-free", as_seed=True)


def test_row_overrides_and_axes(toy, edit):
    edit("catalog/entries/method_2.yaml", "rank: 2, badge: Method}",
         "rank: 2, badge: null, code: null, authors: null, title: Other, application: [text2video]}")
    row = render_list(load(toy), "training-free").split("- **[2]")[1].split("- **[3]")[0]
    assert row == (" Other**, arXiv 2024.\n\n  [[Paper](https://arxiv.org/pdf/2001.10002)] [Code]"
                   " ![](https://img.shields.io/badge/Text2Video-green)"
                   " ![](https://img.shields.io/badge/Token_Merging-orange)\n\n")


@pytest.mark.parametrize("readme", ["", "# no markers\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{BEGIN}{END}"])
def test_readme_needs_its_markers(toy, readme, capsys):
    with pytest.raises(MarkerError):
        render_part(load(toy), readme)
    (toy / "README.md").write_text(readme)
    assert run(toy) == 1 and (toy / "README.md").read_text() == readme


def test_readme_outside_the_markers_is_kept(toy):
    text = render_part(load(toy), f"# Top\n{BEGIN}\nold\n{END}\nbottom `x`\n")
    assert text.startswith(f"# Top\n{BEGIN}\n") and text.endswith(f"{END}\nbottom `x`\n") and "old" not in text
    assert text.count("\n| Method ") == 4       # header and three rows


@pytest.mark.parametrize(("plain", "shown"), [
    ("a*b_c", r"a\*b\_c"), ("[x](y)", r"\[x\](y)"), ("<b>&", "&lt;b&gt;&amp;"), ("a|b", r"a\|b"), ("`x`", r"\`x\`"),
    ("$x$", r"\$x\$"), ("~~x~~", r"\~\~x\~\~"), ("back\\slash", r"back\\slash"), ("∆-DiT: 3 × 4!", "∆-DiT: 3 × 4!"),
])
def test_markdown_escapes(plain, shown):
    assert markdown(plain) == shown


@given(st.text())
def test_escaped_text_has_no_live_markup(text):
    shown = markdown(text)
    assert "<" not in shown and ">" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~$]", shown)
    assert re.sub(r"\\(.)", r"\1", shown, flags=re.S).replace("&lt;", "<").replace("&gt;", ">") \
        .replace("&amp;", "&") == text


def test_links_cannot_end_early():
    assert link("https://x.org/a(b)c") == "https://x.org/a%28b%29c"


@given(st.text(min_size=1))
def test_badges_stay_one_path_segment_of_text_and_colour(text):
    shown = shield(text)
    assert not set(shown) & set("()[]<>?#\"' ")
    assert re.fullmatch(r"(?:--|[^-])*", shown)                    # every hyphen doubled: `-colour` stays the last part
    assert urllib.parse.unquote(shown).replace("--", "-") == text.replace(" ", "_")


def test_badge_of_a_name_takes_the_form_of_the_lists():
    assert badge_of("DiffRatio-MoD") == "DiffRatio_MoD" and badge_of("CAT Pruning") == "CAT_Pruning"
    assert badge_of("ca_tome") == "ca__tome"


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.md"
    write(path, "old\n")

    def fail(*_):
        assert path.read_text() == "old\n"
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, "new\n")
    assert path.read_text() == "old\n" and [p.name for p in tmp_path.iterdir()] == ["a.md"]


def test_write_keeps_the_mode_and_line_ends(tmp_path):
    path = tmp_path / "a.sh"
    path.write_text("")
    path.chmod(0o755)
    write(path, "a\nb\n")
    assert path.read_bytes() == b"a\nb\n" and path.stat().st_mode & 0o777 == 0o755
