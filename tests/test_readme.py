"""The README tells the truth about the source: run with `python -m pytest tests/test_readme.py`."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.machinery

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_part_of_the_recipe_lives_on_the_line_that_the_readme_names():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 10
    wrong = []
    for name, file, number in links:
        lines = (ROOT / file).read_text().splitlines()
        if not re.match(rf"(def|class) {name}\b", lines[int(number) - 1]):
            actual = [i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", line)]
            wrong.append(f"{name} is on line {actual} of {file}, not {number}")
    assert not wrong, "\n".join(wrong)


def test_every_file_that_the_readme_links_to_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets and all((ROOT / target).exists() for target in targets), targets
