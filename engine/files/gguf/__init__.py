"""GGUF files: their header, their tensors under our names, their vocabulary."""
