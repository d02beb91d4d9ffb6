"""The same loop, large: many processes, packed shards, and what a run will cost."""
