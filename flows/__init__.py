"""Prefect, and the command line: which task follows which, retries, cache keys, what people see. No mathematics."""
