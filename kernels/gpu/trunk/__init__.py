"""Device versions of what the trunk computes for a few tokens beside its products: attention, the choice of experts."""
