"""The pure core: facts come in (events), commands go out (effects). No I/O, no clock, no randomness."""
