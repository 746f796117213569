"""Other libraries' attention on the CPU, each behind the same interface: see ``contender.py``."""
