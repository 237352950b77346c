"""Verbs about models and the machine."""
