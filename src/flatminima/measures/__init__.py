"""Measures of sharpness, one file for each family."""
