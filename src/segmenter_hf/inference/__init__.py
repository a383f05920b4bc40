"""Prediction: the protocol, images, files, datasets, attention, visualization."""
