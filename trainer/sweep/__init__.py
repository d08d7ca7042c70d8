"""Many runs over the same data and base, compared on the held-out examples: which prefix is short enough and good enough.

`settings` says what is varied, `plan` makes runs of it, `runs` runs them, `pick` judges, `shown` and `report` show.
"""
