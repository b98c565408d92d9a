"""Helpers around the public functions."""
