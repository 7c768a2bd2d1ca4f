"""Small networks behind, beside or before the parts of a block."""
