"""`python -m kernels`: one kernel on the best device of this computer, and a line that says what was found.

On a CUDA device the Triton kernel is compiled, run and compared with its reference: driver, build of torch, C compiler
and Triton are shown to work together before anybody waits for an answer. Exit code 3 if they do not.
"""
from __future__ import annotations

import sys

import torch

from kernels.activation import quantize_activation

GROUP = 64


def main() -> int:
    on_card = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_card else f"processor, {torch.get_num_threads()} threads"
    try:
        found = check("cuda" if on_card else "cpu")
    except (RuntimeError, ImportError, OSError) as error:
        print(f"Self-check on {name}: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
        return 3
    print(f"Self-check on {name}, torch {torch.__version__}: " + ("the kernels work." if found else "wrong numbers."))
    return 0 if found else 3


def check(device: str) -> bool:
    """A ramp comes back from its codes and scales within half a step (the scale is 1 here)."""
    ramp = torch.arange(-31, 33, dtype=torch.float32).repeat(1, 2)
    codes, scales = quantize_activation((ramp * 127 / 32).to(device), GROUP)
    values = codes.cpu().float() * scales.cpu().repeat_interleave(GROUP, 1)
    return bool((values - ramp * 127 / 32).abs().max() <= 0.5 + 1e-3)


if __name__ == "__main__":
    sys.exit(main())
