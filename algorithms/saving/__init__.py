"""Models and trainings on disk: SB3's .zip, and checkpoints that a training goes on from."""
