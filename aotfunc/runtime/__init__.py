"""Programs on real tensors."""
