"""First light: everything that a card can tell in its first nine minutes, each step in a process of its own."""
