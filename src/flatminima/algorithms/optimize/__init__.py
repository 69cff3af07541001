"""Maximisers: they see a function, never a model."""
