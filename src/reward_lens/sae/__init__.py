"""Sparse autoencoders: the dictionary, its training, and the file formats that others read."""
