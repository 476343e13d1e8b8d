"""What XLA is told for a machine, and what it makes of a program for others."""
