"""The yardsticks: what a trained model can do, in numbers. `python evaluate.py` prints them."""
