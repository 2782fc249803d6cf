"""Differential Vision Transformers: train, tune and understand them, from a laptop to a fleet of spot GPUs."""

__version__ = "0.1.0"
