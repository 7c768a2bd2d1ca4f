"""One file a dataset or suite: where its images and labels lie, as a data module."""
