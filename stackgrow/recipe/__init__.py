"""TOML -> Recipe: the schema, every check of a single key, every error message.

May import: text and errors.
Must never know: torch, and what a recipe makes of its values together.
"""
