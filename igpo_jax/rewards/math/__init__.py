"""Decides whether two mathematical answers are equal. Begin reading with `equivalence`."""
