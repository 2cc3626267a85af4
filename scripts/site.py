"""What the documentation's site needs beyond mkdocs.yml: pages that lie outside of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "dataset-refs/README.md": "dataset-refs.md",
}
"""Files of the repository, with their names on the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_from(Path(path).parent, text)))
    return files


def _from(folder: Path, text: str) -> str:
    """Return the text of a page outside of docs/ with its links as seen from docs/."""

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / folder / match[1]).resolve()
        inside = target.is_relative_to(ROOT / "docs")
        return f"]({target.relative_to(ROOT / 'docs') if inside else '../' + match[1]})"

    return _linked(re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", moved, text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ to the pages on the site."""
    return _linked(markdown)


def _linked(text: str) -> str:
    for path, name in ELSEWHERE.items():
        text = text.replace(f"](../{path}", f"]({name}")
    # What is no page is named, and not linked.
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]+\)", r"\1", text)
