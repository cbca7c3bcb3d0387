"""The site: it builds without a warning, and its reference has every public name."""

import ast
import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "ensemble": "modeling_pcm_ensemble",
    "training": "modeling_pcm_ensemble.training",
    "rewards": "modeling_pcm_ensemble.rewards",
    "evaluation": "modeling_pcm_ensemble.evaluation",
    "endpoints": "modeling_pcm_ensemble.endpoints",
}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_every_link_leads_somewhere(site):
    dead = []
    for page in site.rglob("*.html"):
        links = Links()
        links.feed(page.read_text())
        for link in links.found:
            if not re.match(r"\w+:|//|#|/", link):
                target = (page.parent / link.partition("#")[0].partition("?")[0]).resolve()
                dead += [(page.relative_to(site), link)] * (not target.exists())
    for link in re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text()):
        dead += [("llms.txt", link)] * (not (site / link).exists())
    assert not dead


@pytest.mark.parametrize(("page", "package"), PACKAGES.items())
def test_every_public_name_is_in_the_reference(site, page, package):
    text = (site / "reference" / page / "index.html").read_text()
    names = importlib.import_module(package).__all__
    assert [name for name in names if f'id="{package}.{name}"' not in text] == []


def test_docstrings_lose_the_marks_of_transformers(site):
    for page in (site / "reference").rglob("index.html"):
        assert not re.search(r"\[<code>\w+</code>\]", page.read_text()), page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 10_240


def test_troubleshooting_is_about_errors_that_there_are():
    said = "".join(text for path in (ROOT / "modeling_pcm_ensemble").rglob("*.py") for text in texts_of(path))
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    of_no_error = ["Answers begin well and become nonsense", "It is slow", "The answer does not follow the words"]
    assert [heading for heading in headings if heading not in said] == of_no_error


def texts_of(path: Path):
    """A file's texts; what is filled in is left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value for part in node.values if isinstance(part, ast.Constant)) + "\n"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value + "\n"
