"""The chat page. Knows the engine by its door only, and no torch."""
