"""The loss along lines between models: numbers, no drawing."""
