"""Training: data to checkpoint. Needs torch."""
