"""Training: arguments, recipes, Trainer, the whole run."""
