"""Metrics over features of pictures: pure functions of arrays, each with what its interval is made from."""
