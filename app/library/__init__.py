"""Models on the page: what is there, what is open, what works in the background."""
