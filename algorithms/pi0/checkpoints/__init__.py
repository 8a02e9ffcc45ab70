"""Reads PI0 checkpoints: this project's folders and those of other projects."""
