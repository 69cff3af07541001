"""Stochastic estimators: they see an operator, never a model."""
