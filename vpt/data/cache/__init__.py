"""What is known of images beyond their files: pixels once decoded, and hashes of their contents."""
