"""
What the site does beside MkDocs: pages that stand elsewhere in the repository are pages of the site, too, a notebook
among them, and links between files of the repository lead to pages.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
ELSEWHERE = {  # by file of the repository, the page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASE.md": "releases.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "examples/endpoints/README.md": "guides/endpoints.md",
    "examples/serving/README.md": "guides/serving.md",
    "examples/smollm2/README.md": "smollm2.md",
    "examples/smollm2/artifacts/README.md": "artifacts.md",
    "examples/smollm2/artifacts/steering/report.md": "steering.md",
    "examples/space/README.md": "guides/space.md",
    "notebooks/quicktour.ipynb": "quicktour.md",
}
SOURCES = {page: source for source, page in ELSEWHERE.items()}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the pages and pictures that stand outside of docs/."""
    for source, page in ELSEWHERE.items():
        text, pictures = read_page(source)
        files.append(File.generated(config, page, content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))

    for page in [page for page in files if page.src_uri.endswith(".md")]:
        for _, _, target in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            is_outside = path.endswith(PICTURES) and not path.startswith("docs/") and (ROOT / path).exists()
            if is_outside and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def read_page(source: str) -> tuple[str, dict[str, bytes]]:
    """Read a page's Markdown, and the pictures of a notebook by their paths."""
    if source.endswith(".ipynb"):
        text, made = MarkdownExporter().from_filename(str(ROOT / source))
        return text, {f"{posixpath.dirname(source)}/{name}": content for name, content in made["outputs"].items()}

    text = (ROOT / source).read_text(encoding="utf-8")
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL), {}  # without a card's settings


def on_page_markdown(markdown, page, config, files):
    """Let links lead to where the site has what they name; a file that it does not have is named in its place."""

    def linked(match: re.Match) -> str:
        mark, text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match.group()
        path = _in_repository(page.file.src_uri, target)
        where = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(where) is None:
            return text if path in text else f"{text} (`{path}`)"
        anchor = "".join(target.partition("#")[1:])
        return f"{mark}[{text}]({posixpath.relpath(where, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(linked, markdown)


def _in_repository(page: str, target: str) -> str:
    """The file of the repository that a link of a page names."""
    folder = posixpath.dirname(SOURCES.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
