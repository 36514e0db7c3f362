"""Numbers and texts of requests to arrays."""
