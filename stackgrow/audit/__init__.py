"""Whether a run is what it claims to be: nothing is trusted, nothing is written, and no file outside it is read,
but for the token stores that its recipe names (and a replay, which trains on them)."""
