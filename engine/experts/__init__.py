"""The sparse engine: far and near memory of the experts, and what a token does with them."""
