"""Exploration, likelihood estimates and the policy objective."""
