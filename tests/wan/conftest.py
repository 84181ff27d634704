"""What needs diffusers, transformers or peft is tested in this folder, because they take seconds to import."""

from tiny_pipeline import pipeline, transformer

__all__ = ["pipeline", "transformer"]
