"""Writers of metrics and media: JSON lines, TensorBoard, Weights & Biases."""
