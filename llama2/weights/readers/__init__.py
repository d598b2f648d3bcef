"""What reads weights: one module for each format of files."""
