"""Exported models: ONNX and OpenVINO."""
