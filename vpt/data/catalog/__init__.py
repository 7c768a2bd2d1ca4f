"""Which datasets there are, what is known of them, and how to get and verify them."""
