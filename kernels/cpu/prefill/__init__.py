"""Compiled twins for many tokens: whole experts from their codes, and rows decoded for torch's own products."""
