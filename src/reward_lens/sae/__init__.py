"""Sparse autoencoders: what a dictionary of a site is."""
