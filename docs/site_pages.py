"""Hooks of the documentation site: the repository's own pages are pages of it, and links out of `docs/` lead to copies.

A page in `docs/` links to files of the repository by their relative paths, which work wherever the repository is shown.
In the site those files are copies below `files/`, so that the site is whole without a repository on the web.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# in the repository -> in the site
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(\]\(|src=\")([^)\s\"#]+)(#[^)\s\"]*)?(?=[)\"])")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages, and every file that a page links to."""
    known = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    for source, uri in PAGES.items():
        known[source] = uri
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    waiting = list(known)
    while waiting:
        source = waiting.pop()
        for target in _targets(source):
            if target in known or target.startswith("docs/"):
                continue
            known[target] = f"files/{target}"
            files.append(File.generated(config, known[target], abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    config.extra["of_repository"] = known
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the links of a page lead to where their targets are in the site."""
    known = config.extra["of_repository"]
    source = next((path for path, uri in known.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        path = _resolved(source, link[2])
        uri = known.get(path) if path is not None else None
        if uri is None and path is not None and path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        if uri is None:
            return link[0]
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{relative}{link[3] or ''}"

    return _LINK.sub(moved, markdown)


def _targets(source: str) -> list[str]:
    """Files of the repository that a page links to."""
    text = _CODE.sub("", (ROOT / source).read_text(encoding="utf-8"))
    found = [_resolved(source, link[2]) for link in _LINK.finditer(text)]
    paths = [path for path in found if path is not None]
    for path in paths:
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: expected a file {path}, which it links to, got none")
    return [path for path in paths if (ROOT / path).is_file()]


def _resolved(source: str, link: str) -> str | None:
    """The path in the repository that a relative link of a page means; None of another link."""
    if re.match(r"[a-z]+:|/", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
