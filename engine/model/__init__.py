"""transformers' model around the experts: how it is opened and placed."""
