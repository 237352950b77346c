"""Mixture of Lookup Experts (arXiv 2503.15798): experts that see the token's embedding alone, so that what they give
for each token of the vocabulary can be kept in a table."""
