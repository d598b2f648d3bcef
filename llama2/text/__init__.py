"""Text and tokens, and the rules that a reply's text follows."""
