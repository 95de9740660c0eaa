"""A bundle through ONNX Runtime: sessions, providers, memory bound in place."""
