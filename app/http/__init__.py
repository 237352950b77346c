"""Requests: who may come in, what they ask, what streams back."""
