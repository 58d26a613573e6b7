"""What `octoc.export.onnx` is made of: `clean` shrinks torch's graph, `weights` stores compressed tensors in it."""
