"""Encoders of other projects in, encoders for other projects out: one file for each layout."""
