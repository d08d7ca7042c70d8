"""Where artifacts and the version log are kept: one contract (`base`), two keepers of it."""
