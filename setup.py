"""Packaging; the packages are listed by name because kernels/, model/ and bench/ live at the root."""

import re
from pathlib import Path

from setuptools import setup

VERSION = Path(__file__).parent / "memflow_ops" / "version.py"

for link in ("kernels", "model", "bench"):
    if not (Path(__file__).parent / "memflow_ops" / link).is_dir():
        raise SystemExit(
            f"memflow_ops/{link} must be a symbolic link to ../{link}, and is not. On a file system without symbolic "
            f"links copy the folder there, or check out again with: git config core.symlinks true && git checkout ."
        )

# Wan 2.1's text encoder and VAE; the oldest releases that the tests ran with (constraints-lowest.txt) are the bounds.
wan = ["diffusers>=0.41", "transformers>=5.20", "accelerate", "ftfy", "sentencepiece"]

live = ["starlette>=1.7.0", "uvicorn>=0.54.0", "websockets>=16.1.1"]  # the page of `memflow serve`

setup(
    name="memflow-ops",
    version=re.search(r'__version__ = "(.+)"', VERSION.read_text(encoding="utf-8"))[1],
    description="Long memory for streaming video generation: top-k block-sparse memory attention, cache and retrieval",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "memflow_ops",
        "memflow_ops.bench",
        "memflow_ops.bench.aot",
        "memflow_ops.bench.cases",
        "memflow_ops.bench.harness",
        "memflow_ops.bench.report",
        "memflow_ops.bench.stand_in",
        "memflow_ops.cache",
        "memflow_ops.cli",
        "memflow_ops.impl",
        "memflow_ops.impl.reference",
        "memflow_ops.impl.torch",
        "memflow_ops.integrations",
        "memflow_ops.integrations.diffusers",
        "memflow_ops.integrations.self_forcing",
        "memflow_ops.kernels",
        "memflow_ops.kernels.attention",
        "memflow_ops.kernels.retrieval",
        "memflow_ops.kernels.selection",
        "memflow_ops.model",
        "memflow_ops.model.checkpoints",
        "memflow_ops.model.parallel",
        "memflow_ops.model.live",
        "memflow_ops.model.pipeline",
        "memflow_ops.model.replay",
        "memflow_ops.model.score",
        "memflow_ops.model.selection_profile",
        "memflow_ops.model.stories",
        "memflow_ops.model.streaming",
        "memflow_ops.model.toy",
        "memflow_ops.model.toy.evaluation",
        "memflow_ops.model.wan",
        "memflow_ops.ops",
        "memflow_ops.ops.registration",
    ],
    package_data={
        "memflow_ops": ["py.typed"],
        "memflow_ops.model": ["weights/*.safetensors", "weights/*.json", "stories/*.jsonl"],
        "memflow_ops.model.live": ["page/*"],
    },
    install_requires=[
        # Kernels and operators reach into both: the bounds are what was run (constraints-lowest.txt, -highest.txt).
        "torch>=2.11,<2.15",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "typer>=0.29",
        "rich",
        "av>=15",  # what older ones encode in fragments of their own they cannot read
        "matplotlib",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "ray": ["ray>=2.60"],  # what tests/wan/test_ray.py ran with; it is not in [dev], so they are skipped without it
        "wan": wan,
        "live": live,
        "docs": ["mkdocs-material"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "peft>=0.21.2",
            *wan,
            *live,
        ],
    },
    entry_points={"console_scripts": ["memflow = memflow_ops.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
    ],
)
