"""Conversations: their store, the answers, their settings."""
