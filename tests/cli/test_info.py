"""`memflow info`, and the devices that it and the other commands accept."""

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


def test_device_is_refused_where_it_is_not():
    assert environment.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:99"):
        environment.pick_device("cuda:99")
