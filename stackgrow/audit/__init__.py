"""Whether a run is what it claims to be: nothing is trusted, nothing is written, and no file outside it is followed."""
