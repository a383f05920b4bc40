"""Datasets: layouts, loading, decoding, label sets, augmentation."""
