"""Eigensolvers, estimators and maximisers; none of them knows a model."""
