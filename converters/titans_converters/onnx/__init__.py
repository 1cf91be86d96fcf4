"""Programs to ONNX files."""
