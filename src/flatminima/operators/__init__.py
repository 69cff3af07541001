"""Symmetric linear operators known by their products with vectors."""
