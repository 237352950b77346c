"""Model files in and out: checkpoints, GGUF, the compressed folder."""
