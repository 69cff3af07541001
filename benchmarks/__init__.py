"""Measurements of speed and memory: `python -m benchmarks.NAME`.

Each prints ratios measured in one run, with the machine and the versions. Other libraries that
are not installed are left out with a note.
"""
