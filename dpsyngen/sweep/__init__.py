"""Grids of runs, their table and their plots: python -m dpsyngen.sweep."""
