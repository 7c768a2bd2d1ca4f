"""Delta files to the Hugging Face Hub and from there."""
