"""Matrices in the space of a model's outputs."""
