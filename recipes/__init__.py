"""Recipes: build parts, attach handlers, run."""
