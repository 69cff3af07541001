"""Eigensolvers: they see an operator, never a model."""
