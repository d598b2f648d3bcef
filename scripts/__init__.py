"""Small programs around the project, run as `python -m scripts.NAME`."""
