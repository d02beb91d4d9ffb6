"""Eight functions to write, and checks that say what is wrong with an answer (checks.py)."""
