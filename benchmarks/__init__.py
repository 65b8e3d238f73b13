"""Measurements of what the service costs, each beside its baseline in the same run. `python -m benchmarks --help`."""
