"""The shapes of models that are measured: those of `burnish bench`. Imports no torch."""

from burnish.model import shapes
from burnish.model.shapes import FIRST_ID

__all__ = ["FIRST_ID", "SHAPES"]

SHAPES = shapes.SHAPES | {"tiny": shapes.SHAPES["tiny"] | {"max_position_embeddings": 2048}}
"""Here `tiny` has positions for the prompts and answers that benchmarks take where nothing else is asked for."""
