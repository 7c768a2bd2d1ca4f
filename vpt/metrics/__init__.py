"""Scores of tables of logits. Arrays in, numbers out: no models, no files."""
