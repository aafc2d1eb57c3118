"""The guarantee: the plan, accounting, Poisson sampling, per-example gradients, the private step, the ledger."""
