"""Makes plans from the tables of families, in each direction."""
