"""Training and honest evaluation of chest X-ray classifiers in JAX and Flax."""

__version__ = "0.1.0"
