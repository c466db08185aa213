"""The search for a candidate within the budget: what is tried, in which order, and which candidate is chosen."""
