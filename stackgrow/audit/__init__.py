"""Whether a run is what it claims to be, from its recipe to its final weights.

May import: every room below.
Must never know: how a run is steered: it writes nothing, trusts nothing, and reads nothing else but token stores.
"""
