"""Colours that all pictures share."""

from __future__ import annotations

INK, PALE = "#22262b", "#6b737c"
