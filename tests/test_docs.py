"""What the documents point at is there: links, files and folders; and the version is stated in one place."""

import re
from pathlib import Path

import pytest
import typer.main

from memflow_ops import __version__
from memflow_ops.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "out"}


def read(page):
    return page.read_text(encoding="utf-8")


def targets(page):
    """Every relative link of a page, and every path between backquotes that starts in a folder of the root."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", read(page)):
        yield link, page.parent / link
    for path in re.findall(r"`([\w.]+/[\w./-]*)`", read(page)):
        if path.split("/")[0] in TOP:
            yield path, ROOT / path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page):
    assert not [name for name, path in targets(page) if not path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_and_make_targets_that_a_page_names_are_there(page):
    modules = re.findall(r"\bmemflow_ops(?:\.\w+)+", read(page))
    missing = [name for name in modules if not is_module(name) and not is_module(name.rpartition(".")[0])]
    assert not missing
    makefile = read(ROOT / "Makefile")
    assert not [name for name in re.findall(r"\bmake ([a-z-]+)`", read(page)) if f"\n{name}:" not in makefile]


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_a_missing_file_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md), `docs/gone.md`, `tests/test_docs.py`", encoding="utf-8")
    assert [name for name, path in targets(page) if not path.exists()] == ["gone.md", "docs/gone.md"]


def test_citation_and_changelog_state_the_version():
    assert f"\nversion: {__version__}\n" in read(ROOT / "CITATION.cff")
    assert f"\n## {__version__} " in read(ROOT / "CHANGELOG.md")


def commands():
    """Name of a command, such as `toy demo` -> its options."""
    found = {}

    def walk(command, words):
        if subcommands := getattr(command, "commands", None):
            for name, below in subcommands.items():
                walk(below, (*words, name))
        else:
            found[" ".join(words)] = {flag for option in command.params for flag in option.opts + option.secondary_opts}

    walk(typer.main.get_command(app), ())
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_that_a_page_shows_exist_with_their_options(page):
    known = commands()
    shown = re.findall(r"(?:`|^)memflow ([a-z][^`\n#]*)", read(page), re.MULTILINE)
    for line in shown:
        words = line.split()
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known), None)
        assert name, f"memflow {line}"
        assert {word for word in words if word.startswith("--")} <= known[name] | {"--help"}, f"memflow {line}"
