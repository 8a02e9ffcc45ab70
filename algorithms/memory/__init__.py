"""Manages an update's memory: which prefixes are kept, and which micro-batches fit."""
