"""Names become weights, weights become files."""
