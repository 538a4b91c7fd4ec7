"""Training: data, losses, optimizers and the one loop that pre-training, tuning and alignment share."""
