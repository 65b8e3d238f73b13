"""Turns a result file into tables, plots and comparisons."""
