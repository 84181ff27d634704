"""The integrations are tested with diffusers' own transformer, and with modules of the Self-Forcing kind."""

from tiny_pipeline import pipeline, transformer

__all__ = ["pipeline", "transformer"]
