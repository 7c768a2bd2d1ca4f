"""Visual prompts: deep, shallow, around the image, with their options."""
