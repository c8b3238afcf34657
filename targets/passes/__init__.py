"""Graph passes: one file each, ONNX in, ONNX out."""
