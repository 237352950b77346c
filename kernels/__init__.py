"""Tensors in, tensors out. Knows no model, no file and no cache policy.

Every function stands once in plain torch (the oracle, and the CPU path). Importing this loads no torch.
"""
