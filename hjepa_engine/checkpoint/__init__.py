"""Checkpoints: what is saved, how it is stored, and which ones are kept."""
