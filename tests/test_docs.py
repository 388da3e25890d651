"""The words: every link leads somewhere, README is short, and its code is that of the files, and runs."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import grow
from conftest import checkpoint_of, random_model
from run import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names by which other pages can link to the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(page: Path) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


def test_readme_names_every_file():
    files = [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")]
    names = {file.relative_to(ROOT).as_posix() for file in files} - {"conftest.py", "lab/__init__.py"}
    assert names <= set(re.findall(r"`([\w/]+\.py)`", README.read_text()))


def test_the_growth_in_readme_is_that_of_the_code():
    source = textwrap.dedent(inspect.getsource(grow.grow_depth).split('"""')[2])
    assert any(block in source for block in code_blocks(README))


def test_the_library_use_in_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pretrained").symlink_to(ROOT / "pretrained")
    save_checkpoint(Path("runs/base/checkpoint"), checkpoint_of(random_model()))
    (block,) = (block for block in code_blocks(README) if "import" in block)
    names = {}
    exec(block, names)
    assert names["larger"].config.depth == names["model"].config.depth + 2
    assert load_checkpoint("runs/grown").ema.config == names["grown"].ema.config
