"""The front door: help, errors, completion, and what starting the command costs."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import memflow
from typer.main import get_command

from memflow_ops import __version__
from memflow_ops.cli.main import app

ROOT = Path(__file__).parents[2]
TOP = ("toy", "generate", "convert", "verify", "profile-selection", "score", "serve", "bench", "info")
TOY = ("demo", "generate", "evaluate", "train", "profile-selection")
PAGES = [(), *((name,) for name in TOP), *(("toy", name) for name in TOY)]


def command_at(page):
    """The command that a page of help is about."""
    command = get_command(app)
    for name in page:
        command = command.commands[name]
    return command


def python(*words, **environment):
    """Run Python in a process of its own, with this checkout's package."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=variables)


@pytest.fixture(autouse=True)
def no_colours(monkeypatch):
    """Typer takes the logs of some services for terminals with colours."""
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", False)


@pytest.mark.parametrize("page, names", [((), TOP), (("toy",), TOY)], ids=["memflow", "memflow toy"])
def test_a_group_alone_names_its_commands(page, names, capfd):
    assert memflow(*page) == 0
    said = capfd.readouterr().out
    assert re.findall(r"^. ([a-z][a-z-]+)  ", said, re.MULTILINE) and all(f" {name} " in said for name in names)
    assert set(command_at(page).commands) == set(names)


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_the_terminal_and_explains_every_option(page, width, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert memflow(*page, "-h") == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    names = [max(parameter.opts, key=len) for parameter in command_at(page).params if parameter.opts[0].startswith("-")]
    assert all(f"{name} " in said for name in names)
    assert all(parameter.help for parameter in command_at(page).params)


def test_help_texts_are_wrapped_for_narrow_terminals():
    """Typer keeps the line breaks of all paragraphs but the first."""
    for page in PAGES:
        summary, *more = inspect.cleandoc(command_at(page).help).split("\n\n")
        assert summary and all(len(line) <= 76 for paragraph in more for line in paragraph.splitlines()), page


def examples():
    for page in PAGES:
        text = inspect.cleandoc(command_at(page).help).replace("\\\n", " ")
        for line in re.findall(r"^  (memflow .*)$", text, re.MULTILINE):
            yield pytest.param(page, shlex.split(line)[1:], id=" ".join(page) + ": " + line)


@pytest.mark.parametrize("page, words", list(examples()))
def test_examples_are_commands(page, words):
    """Every example in a page of help is one of that command, with options that exist and take these values."""
    if page:
        assert tuple(words[: len(page)]) == page
    else:
        page = tuple(words)
    command_at(page).make_context("memflow", words[len(page) :])


def test_every_command_for_videos_has_an_example():
    assert {param.values[0] for param in examples()} >= set(PAGES) - {("info",), ("toy",)}


WRONG = {
    "command": (("nope",), "No such command 'nope' (see memflow --help)"),
    "command of the toy world": (("toy", "nope"), "No such command 'nope' (see memflow toy --help)"),
    "option": (("toy", "demo", "--colour", "red"), "No such option: --colour"),
    "argument": (("toy", "generate", "--out", "x"), "Missing argument 'STORY' (see memflow toy generate --help)"),
    "required option": (("toy", "generate", "x"), "Missing option '--out' (see memflow toy generate --help)"),
}


@pytest.mark.parametrize("words, expected", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_command_line_is_one_line_that_says_where_help_is(words, expected, capfd):
    assert memflow(*words) == 2
    said = capfd.readouterr()
    assert expected in said.err and said.err.startswith("memflow: ") and said.err.count("\n") == 1 and not said.out


def test_ctrl_c_is_exit_code_130(capfd, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("memflow_ops.cli.bench.run.stored", interrupted)
    assert memflow("bench", "--stored") == 130
    assert capfd.readouterr().err == "memflow: interrupted\n"


def test_version(capfd):
    assert memflow("--version") == 0
    assert capfd.readouterr().out == f"memflow-ops {__version__}\n"


def test_the_package_runs_and_imports_nothing_that_help_does_not_need():
    """torch comes with the package itself; the rest of what is slow waits until a command needs it."""
    done = python("-X", "importtime", "-m", "memflow_ops", "--help", _TYPER_FORCE_DISABLE_TERMINAL="1")
    assert done.returncode == 0 and "Usage: memflow" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "torch" in imported
    assert not imported & {"matplotlib", "diffusers", "transformers", "triton", "peft", "scipy", "pandas"}


@pytest.mark.parametrize("module", ["memflow_ops", "memflow_ops.cli"])
@pytest.mark.parametrize("words, code, said", [(("-h",), 0, "Usage: memflow"), (("nope",), 2, "No such command")])
def test_the_package_and_its_commands_run_as_modules(module, words, code, said):
    done = python("-m", module, *words, _TYPER_FORCE_DISABLE_TERMINAL="1")
    assert done.returncode == code and said in done.stdout + done.stderr


COMPLETED = {
    "commands": ("memflow toy ", list(TOY)),
    "kinds of memory": ("memflow toy generate --memory s", ["sink"]),
    "sizes": ("memflow bench --size w", ["wan-1.3b"]),
}


@pytest.mark.parametrize("typed, expected", COMPLETED.values(), ids=COMPLETED.keys())
def test_the_shell_completes_commands_and_values(typed, expected, monkeypatch, capfd):
    monkeypatch.setenv("_MEMFLOW_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - (not typed.endswith(" "))))
    assert memflow() == 0
    assert capfd.readouterr().out.split() == expected
