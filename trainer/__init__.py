"""Learning prefixes, and judging them before they are served. Extra `[train]`; the server never imports it."""
