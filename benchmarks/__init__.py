"""What proves the claims: one script per table; each prints a table, writes one JSON and ends with it on one line."""
