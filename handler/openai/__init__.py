"""OpenAI's API, read and answered."""
