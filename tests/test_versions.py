"""The versions that the packaging allows are those that the tests run with: the lowest and the highest of them."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def requirements():
    """Name -> requirement, of everything in setup.py that is given with a version."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.List)]
    texts = [item.value for node in lists for item in node.elts if isinstance(item, ast.Constant)]
    found = [Requirement(text) for text in texts if re.match(r"[\w-]+[<>=]", text)]
    return {requirement.name: requirement for requirement in found}


def pins(name):
    """Name -> versions, one for each range of Python versions, in a file of constraints."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if pinned := re.match(r"([\w-]+)==([\w.]+)", line):
            found.setdefault(pinned[1], []).append(Version(pinned[2]))
    return found


def test_torch_and_its_compiler_have_bounds():
    """Kernels and operators reach into both, and a version that nobody ran may be wrong without a word."""
    for name in ("torch", "triton"):
        assert {part.operator for part in requirements()[name].specifier} == {">=", "<"}


@pytest.mark.parametrize("requirement", requirements().values(), ids=str)
def test_bounds_are_what_was_run(requirement):
    for part in requirement.specifier:
        if part.operator == ">=":
            assert pins("constraints-lowest.txt")[requirement.name] == [Version(part.version)]
        else:
            assert part.operator == "<"
            (highest,) = pins("constraints-highest.txt")[requirement.name]
            if requirement.name == "triton":  # one newer than that of this torch runs in the interpreter alone
                highest = Version(re.search(r"TRITON=([\d.]+)", WORKFLOW)[1])
            assert Version(part.version).release == (highest.major, highest.minor + 1)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-highest.txt"])
def test_what_is_run_is_allowed(name):
    pinned = pins(name)
    for requirement in requirements().values():
        assert pinned[requirement.name], requirement.name
        for version in pinned[requirement.name]:
            assert version in requirement.specifier


def test_lowest_and_highest_are_run_for_every_change():
    for name in ("constraints.txt", "constraints-lowest.txt", "constraints-highest.txt"):
        assert re.search(rf"constraints: \[?{re.escape(name)}", WORKFLOW), name
