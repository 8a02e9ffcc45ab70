"""Vectorized environments: which CFGRL takes, and two of its own."""
