"""Recipe -> Plan: exact stages, their steps, tokens, FLOPs and bytes, and what is wrong beyond single keys.

May import: growth, recipe and what lies below them.
Must never know: torch, and anything on disk but the base model that a recipe names.
"""
