"""The pages of the documentation: every link of theirs leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not page.relative_to(ROOT).parts[0].startswith((".", "changelog.d", "dist"))
)


def anchors(page: Path) -> set[str]:
    """Return where links into a page may lead, as forges make it of its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    return [link or image for link, image in found if "://" not in (link or image)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_first_host_is_within_two_screens() -> None:
    """And what is before it is not long, either: whoever reads on has decided to."""
    lines = (ROOT / "README.md").read_text().splitlines()
    [first] = [number for number, line in enumerate(lines) if "<!-- test: first host -->" in line]
    # Two screens of 50 lines each.
    assert lines.index("```", first + 2) < 2 * 50


def test_pages_name_no_program_that_is_not_there() -> None:
    scripts = {path.name for path in (ROOT / "scripts").iterdir()}
    for page in PAGES:
        named = set(re.findall(r"`scripts/([a-z0-9-]+)", page.read_text()))
        assert named <= scripts, page


def test_the_converter_runs_with_nothing_but_python() -> None:
    done = subprocess.run(
        ["python3", "-I", ROOT / "scripts/coming-from", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
