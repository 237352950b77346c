"""What to fetch, keep and route: plain functions that the experts' runtime asks."""
