"""The layout: four Python files at the top, small enough to read, arrows one way; README points at what it names.

    pytest tests/test_layout.py
"""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT

pytestmark = pytest.mark.machinery

TOP = {"train_prx.py", "muon.py", "data_prep.py", "sample.py"}
CODE = sorted(file.relative_to(ROOT) for folder in (".", "tools", "benchmarks", "records", "tests", ".ci")
              for file in (ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py")))
README = (ROOT / "README.md").read_text()


def lines_of(file: str | Path) -> list[str]:
    return (ROOT / file).read_text().splitlines()


def test_the_top_level_has_four_python_files():
    assert {file.name for file in CODE if file.parent == Path(".")} == TOP


def test_importing_train_prx_loads_muon_and_nothing_else_of_the_project():
    script = ("import sys, train_prx\n"
              "for module in list(sys.modules.values()):\n"
              "    print(getattr(module, '__file__', None))")
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | ENV, capture_output=True,
                             text=True, check=True).stdout.splitlines()
    loaded = {ROOT / path for path in CODE} & {Path(path) for path in printed}
    assert {file.name for file in loaded} == {"train_prx.py", "muon.py"}, printed


@pytest.mark.parametrize("file, most", [("train_prx.py", 1500), ("muon.py", 300), ("records/race.py", 500),
                                        ("README.md", 250), ("run.sh", 110)])
def test_files_are_short_enough_to_read(file, most):
    assert len(lines_of(file)) <= most


def test_the_tests_have_at_most_6000_lines():
    assert sum(len(lines_of(file)) for file in CODE if file.parts[0] == "tests") <= 6000


def test_no_line_is_longer_than_120_columns():
    assert not [f"{file}:{n}" for file in CODE for n, line in enumerate(lines_of(file), 1) if len(line) > 120]


# ---------------------------------------------------------------------------------------------------------------------
# Imports


def imports_of(file: Path) -> set[Path]:
    """The project's files that a file imports, inside functions too: from the root, or else from beside the file."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = [Path(*name.split(".")).with_suffix(".py") for name in names]
    return {path if path in CODE else file.parent / path for path in paths} & {*CODE}


ARROWS = {file: imports_of(file) for file in CODE}


def test_imports_form_no_circle():
    def walk(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(map(str, (*path, file)))
        for imported in ARROWS[file]:
            walk(imported, (*path, file))

    for file in CODE:
        walk(file, ())


def test_arrows_point_from_tools_to_the_four_files_and_no_other_way():
    allowed = {"muon.py": set(), "train_prx.py": {"muon.py"}, "data_prep.py": TOP, "sample.py": TOP}
    for file, imported in ARROWS.items():
        inner = {str(path) for path in imported}
        if file.name in TOP and file.parent == Path("."):
            assert inner <= allowed[file.name], f"{file} imports {inner}"
        elif file.parts[0] == "tools":  # nothing imports a benchmark, a record or a test
            assert inner <= TOP | {str(path) for path in CODE if path.parts[0] == "tools"}, f"{file} imports {inner}"
    assert ARROWS[Path("train_prx.py")] == {Path("muon.py")} and len(ARROWS[Path("tests/test_model.py")]) >= 3


# ---------------------------------------------------------------------------------------------------------------------
# README


def test_every_name_that_the_readme_links_to_is_on_the_line_that_it_says():
    links = re.findall(r"\[`?(\w+)`?\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 10
    wrong = []
    for name, file, number in links:
        defines = rf"\s*(?:def|class) {name}\b|{name}(?:: .+)? = "
        at = [n for n, line in enumerate(lines_of(file), 1) if re.match(defines, line)]
        if int(number) not in at:
            wrong.append(f"{name} is on line {at} of {file}, not {number}")
    assert not wrong, "\n".join(wrong)


def test_every_file_that_the_readme_links_to_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert targets and not missing
