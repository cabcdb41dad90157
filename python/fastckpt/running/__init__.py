"""A plan run: where bytes go, what is computed or quantised on the way, one run with its report."""
