"""Kinds of modules that mix tokens, where transformers' own form of one is not all there is."""
