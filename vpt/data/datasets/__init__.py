"""One file a dataset or suite: where its images and labels lie, as a data module.

A DataError says which file is missing, malformed or incomplete, and what tree is expected.
"""
