"""One file per foreign format: a `read_*` function that returns a `Converted`, or refuses by name."""
