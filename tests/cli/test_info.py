"""`memflow info`, and the devices that it and the other commands accept."""

import os
import subprocess
import sys

import pytest
import torch

from memflow_ops import environment


def test_info_without_triton():
    program = "import sys; sys.modules['triton'] = None\nfrom memflow_ops.cli import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:36].strip(): line[36:] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows["torch"] in (torch.__version__, "yes") and rows["reference"] == "yes"
    assert "not installed" in rows["our Triton kernel"]
    assert "matplotlib" not in done.stderr


def test_info_with_packages_whose_import_fails(tmp_path):
    """They were built for another torch, or lack a library: each is one that cannot be used, and says why."""
    for name, line in (("flash_attn", "raise OSError('no libcudart.so.12')"), ("triton", "raise ImportError('GLIBC')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
    program = "from memflow_ops.cli import main; main(['info'])"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    rows = {line[:36].strip(): line[36:] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows["flash-attn"] == "no: the import of flash_attn.cute fails: OSError: no libcudart.so.12"
    assert rows["our Triton kernel"] == "no: the import of triton fails: ImportError: GLIBC"


def test_device_is_refused_where_it_is_not():
    assert environment.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:99"):
        environment.pick_device("cuda:99")
