"""Snapshots of a training, their principal components and losses."""
