"""The model files: imported as a package, and loaded by transformers as remote code from a model's repository."""
