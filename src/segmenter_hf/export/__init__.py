"""Exported models: ONNX."""
