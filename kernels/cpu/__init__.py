"""The functions of kernels/ compiled for this processor by numba; chosen by kernels/dispatch.py for CPU tensors.

Inner loops are LLVM vectors, written with `vectors.py`; what differs between processors is one operation, `dots.py`.
"""
