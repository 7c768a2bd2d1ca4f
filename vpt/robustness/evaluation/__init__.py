"""A model on its test sets at every strength: each image once, its logits kept."""
