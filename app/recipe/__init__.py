"""The recipe: what to merge and how. A superset of mergekit's grammar, in YAML or JSON."""

from app.recipe.grammar import Output, Recipe, SourceEntry
from app.recipe.parse import parse_recipe

__all__ = ["Output", "Recipe", "SourceEntry", "parse_recipe"]
