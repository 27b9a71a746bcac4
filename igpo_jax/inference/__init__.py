"""Asking a model: what is asked, with which settings, and how answers are shown."""
