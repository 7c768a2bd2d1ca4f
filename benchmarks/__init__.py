"""Speed, memory and accuracy, measured by commands that print what the documentation quotes."""
