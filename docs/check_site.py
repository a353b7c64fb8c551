"""Follow every link within the built site to its file and anchor; other sites are left alone.

    python docs/check_site.py [docs/_build]

Also says if a page asks the network for anything: scripts, styles and pictures have to be its own.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: What a page loads by itself, as opposed to what a reader may follow.
LOADED = {"img", "script", "link", "source", "iframe"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("id", "name"):
            if values.get(name):
                self.anchors.add(str(values[name]))
        for name in ("href", "src"):
            if values.get(name):
                self.links.append((tag, str(values[name])))


def problems(site: Path) -> list[str]:
    """Return what is wrong with the links of a site, a line each."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if tag in LOADED and parts.scheme != "data":
                    found.append(f"{path.name} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{path.name} links to {link}, which is not there")
            # Pages of source code link back under one name of their module, not under every object's.
            elif "_modules" in path.parts:
                continue
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path.name} links to {link}, where there is no such anchor")
    return found


def main() -> None:
    """Print the problems; fail if there is one, or no site."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "_build")
    if not (site / "index.html").exists():
        sys.exit(f"Expected a built site; got {site}. Run sphinx-build -W -n docs docs/_build first.")
    found = sorted(set(problems(site)))
    print("\n".join(found) or f"all links of {len(list(site.rglob('*.html')))} pages hold")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
