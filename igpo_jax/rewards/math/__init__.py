"""Whether two mathematical answers are equal: `equivalence` has the rules and their order."""
