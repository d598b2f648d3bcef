"""Grammars as text: what a JSON schema or a regular expression allows, written in the EBNF that xgrammar reads."""
