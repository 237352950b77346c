"""Compiled twins of kernels/trunk."""
