"""Train diffusion models on private images under differential privacy; sample; evaluate."""

__version__ = "0.1.0"
