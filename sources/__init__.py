"""What there is to learn from: the data sets, each a function that returns Pairs; and the feed."""
