"""How results look: pages that open offline, and plots. Knows nothing of what is shown.

Stands below `trainer` and `loadtest`, which say what there is to see. No server process imports it.
"""
