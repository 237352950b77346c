"""What the trunk computes for a few tokens, from its codes: products, attention, the choice of experts."""
