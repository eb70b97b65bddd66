"""From tables to plans: what a family's rules mean, in each direction."""
