"""The search for the candidate that keeps the budget: what is tried, in which order, and which one is chosen."""
