"""What runs are worth, and what they cost: python -m benchmarks.utility --row NAME; docs/results.md is its page."""
