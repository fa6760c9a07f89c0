"""What `align doctor` and `align check` find out: one line each, passed or failed with its remedy."""
