"""Sharing: model cards, published models, the way to the Hub."""
