"""Evaluation: confusion matrices, mean IoU, the protocol over a split."""
