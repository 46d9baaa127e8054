"""Training: settings, losses, the loop, and checkpoints that survive a killed process."""
