"""How fast: whole models, single steps, single kernels."""
