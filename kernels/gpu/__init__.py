"""The Triton twin of each kernel, for CUDA tensors."""
