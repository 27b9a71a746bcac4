"""Looking at a run: its files read, and one drawing for the page, the terminal and the notebook."""
