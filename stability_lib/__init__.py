"""Transformer training stability: models, probes, run store and spectral profiles behind the notebooks."""

__version__ = "0.1.0"
