"""Parity tests need torch; where it is not installed they are not collected (`make test` needs none)."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
