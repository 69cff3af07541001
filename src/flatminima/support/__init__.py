"""Checks, randomness, progress, precision, failures, nested data and vector layouts."""
