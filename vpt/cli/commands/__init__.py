"""One short file a command: what it takes, whom it calls."""
