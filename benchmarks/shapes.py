"""The shapes of models that are measured: those of `burnish bench`. Imports no torch."""

from burnish.model.shapes import FIRST_ID, SHAPES

__all__ = ["FIRST_ID", "SHAPES"]
