"""Conversations of other programs: one small reader a format, found by what a file holds, never by its name."""
