"""Adapters as values, and how to combine them. NumPy only; no framework, no network."""
