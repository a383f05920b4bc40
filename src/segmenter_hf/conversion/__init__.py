"""Checkpoints of other code bases to models of this package."""
