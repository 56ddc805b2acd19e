"""Prefect, and the command line: which task follows which, retries, cache keys, what people see. No mathematics."""

from flows.environment import prepare
from flows.parsing import parse_in_turn

prepare()  # Prefect reads its settings when it is first imported, which is always after this
parse_in_turn()
