"""What the documentation's site needs beyond mkdocs.yml.

Pages that lie outside of docs/, and the notebooks as pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "dataset-refs/README.md": "dataset-refs.md",
}
"""Files of the repository, with their names on the site."""
NOTEBOOKS = "notebooks"
"""Their folder in docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and one for each notebook."""
    for path, name in ELSEWHERE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_from(Path(path).parent, text)))
    for notebook in sorted((ROOT / "docs" / NOTEBOOKS).glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(notebook))
        for picture, data in resources["outputs"].items():
            shown = f"{notebook.stem}-{picture}"
            text = text.replace(f"]({picture})", f"]({shown})")
            files.append(File.generated(config, f"{NOTEBOOKS}/{shown}", content=data))
        note = f"*This page is a notebook: [download it]({notebook.name}).*\n"
        title, _, rest = text.lstrip().partition("\n")
        files.append(
            File.generated(
                config, f"{NOTEBOOKS}/{notebook.stem}.md", content=f"{title}\n\n{note}{rest}"
            )
        )
    return files


def _from(folder: Path, text: str) -> str:
    """Return the text of a page outside of docs/ with its links as seen from docs/."""

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / folder / match[1]).resolve()
        inside = target.is_relative_to(ROOT / "docs")
        return f"]({target.relative_to(ROOT / 'docs') if inside else '../' + match[1]})"

    return _linked(re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", moved, text))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave docs/ to the pages on the site."""
    inside = page.file.src_uri.startswith(NOTEBOOKS)
    return markdown if inside else _linked(markdown)


def _linked(text: str) -> str:
    for path, name in ELSEWHERE.items():
        text = text.replace(f"](../{path}", f"]({name}")
    # What is no page is named, and not linked.
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]+\)", r"\1", text)
