"""What an installation must bring: setup.py lists the packages by name, and no folder may be forgotten there."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_code_is_listed():
    folders = set()
    for part in ("memflow_ops", "kernels", "model", "bench"):
        for path in (ROOT / part).rglob("*.py"):
            words = path.parent.relative_to(ROOT).parts
            folders.add(".".join(words if part == "memflow_ops" else ("memflow_ops", *words)))
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "packages"
    )
    assert set(listed) == folders and len(listed) == len(folders)
