"""Changes of the backbone's linear maps of low rank."""
