"""Measurements of this project; `python -m benchmarks` lists them. Not installed."""
