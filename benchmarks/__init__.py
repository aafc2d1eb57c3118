"""Measurements. A package of its own name, since others install one too: python -m benchmarks.utility; the files beside it are scripts."""
