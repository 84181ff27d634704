"""The order of the floors: a file may import what stands on its own floor or below, never above, and never in a circle.

docs/design.md has the plan of the house in words. The folders kernels/, model/ and bench/ are also reached through the
symbolic links in memflow_ops/, and count as memflow_ops.kernels, memflow_ops.model and memflow_ops.bench.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "model", "bench", "memflow_ops")

# From the ground up. A module belongs to the longest name here that it starts with.
FLOORS = (
    ("geometry",),
    ("kernels.integers", "kernels.launch", "kernels.primitives", "kernels.configs", "kernels.sass", "kernels.aot"),
    ("kernels.selection",),
    ("kernels",),
    ("rotary", "token_order", "files", "journal", "state_file", "allocator", "host_memory", "version"),
    ("impl",),
    ("environment",),
    ("ops.registration",),
    ("ops",),
    ("",),  # memflow_ops itself, which names what is public
    ("cache",),
    ("integrations",),
    ("model", "model.wan", "model.checkpoints.containers"),  # files of weights, which know no network
    ("model.parallel",),
    ("model.stories",),
    ("model.checkpoints",),
    ("model.streaming",),
    ("model.replay",),
    ("model.toy",),
    ("model.toy.evaluation",),
    ("model.pipeline",),
    ("model.score",),
    ("model.live",),
    ("model.selection_profile",),
    ("bench.sizes", "bench.inputs"),
    ("bench.harness",),
    ("bench.cases",),
    ("bench.report",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {f"memflow_ops.{name}".rstrip("."): height for height, names in enumerate(FLOORS) for name in names}


def sources(root):
    """Module name -> source text of every file of the package; the links are not followed, their targets are read."""
    found = {}
    for part in PARTS:
        for path in sorted((root / part).rglob("*.py")):
            words = path.relative_to(root).with_suffix("").parts
            name = ".".join(words if part == "memflow_ops" else ("memflow_ops", *words))
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def arrows(found):
    """Module -> the modules of the package that it imports, wherever in the file the import stands."""
    arrows = {}
    folders = {".".join(words[:n]) for words in (name.split(".") for name in found) for n in range(1, len(words) + 1)}
    for name, text in found.items():
        targets = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively, which hides where the import leads"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    targets.add(whole if whole in folders else str(node.module))
        arrows[name] = {target for target in targets if target.split(".")[0] == "memflow_ops"} - {name}
    return arrows


def height(module):
    words = module.split(".")
    return next(HEIGHT[start] for n in range(len(words), 0, -1) if (start := ".".join(words[:n])) in HEIGHT)


def complaints(found):
    """Every arrow that runs up, and one circle of files if there is one, in words."""
    imports = arrows(found)
    wrong = [f"{a} imports {b}, which stands above it" for a in imports for b in imports[a] if height(b) > height(a)]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' <- '.join(error.args[1])}")
    return wrong


def test_imports_run_one_way_and_never_in_a_circle():
    found = sources(ROOT)
    assert len(found) > 100
    assert not complaints(found)


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("memflow_ops.kernels.launch", "from memflow_ops.ops import checks", "stands above"),
        ("memflow_ops.ops.checks", "from memflow_ops.model.toy.world import render", "stands above"),
        ("memflow_ops.cache.layout", "def f():\n    from memflow_ops.cache.frame_cache import FrameCache", "a circle"),
        ("memflow_ops.cache.layout", "import memflow_ops.cli", "stands above"),
        ("memflow_ops.cache.layout", "from memflow_ops import model", "stands above"),
        ("memflow_ops.model.wan.vae", "from memflow_ops.model import toy", "stands above"),
    ],
)
def test_a_planted_import_is_seen(module, line, said):
    found = sources(ROOT)
    found[module] += f"\n{line}\n"
    assert any(said in complaint and module in complaint for complaint in complaints(found))
