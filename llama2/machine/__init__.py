"""The machine's memory and processors."""
