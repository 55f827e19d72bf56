"""Feeds the generated pages to mkdocs: `hooks: [tools/mkdocs_hook.py]`. All work is in tools/render_site.py."""
from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from accel_tools.catalog import CatalogError
from accel_tools.pages.site import read
from accel_tools.render_site import nav, pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    try:
        site = read(Path(config.config_file_path).parent)
    except (CatalogError, SyntaxError, ValueError) as error:
        raise PluginError(str(error)) from error
    for path, text in pages(site).items():
        files.append(File.generated(config, path, content=text))
    below = nav(site)
    config.nav = [_with_children(item, below) for item in config.nav]
    return files


def _with_children(item: dict, below: dict[str, list]) -> dict:
    """`Methods: methods/index.md` becomes a section with that page on top and the generated pages below."""
    (title, page), = item.items()
    return {title: [page, *below[page]]} if isinstance(page, str) and page in below else item
