"""Running the grid, keeping what it finds, and the statistics of paired runs."""
