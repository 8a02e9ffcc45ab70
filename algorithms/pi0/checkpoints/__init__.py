"""PI0 checkpoints in and out: this project's folders and those of others."""
