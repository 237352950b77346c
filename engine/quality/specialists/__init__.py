"""Specialists: a smaller model out of a compressed one, for the texts of one kind."""
