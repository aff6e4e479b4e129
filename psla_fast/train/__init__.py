"""Training: a recipe -> a run folder with checkpoints, scores and PSLA's result files."""
