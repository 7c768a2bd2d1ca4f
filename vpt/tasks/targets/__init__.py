"""What is compared with each kind of targets, and how: losses of training, scores of validation and test."""
