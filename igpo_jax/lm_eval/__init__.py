"""The models of this package in the LM Evaluation Harness (the package lm_eval)."""
