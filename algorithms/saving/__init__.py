"""Saves models and trainings: SB3's .zip, and checkpoints from which a training goes on."""
