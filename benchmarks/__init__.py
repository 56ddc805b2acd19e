"""What is measured: `python -m benchmarks.NAME` prints a table and, as the last line, one JSON object."""
