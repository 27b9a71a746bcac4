"""Rows of JSON in files, local or remote."""
