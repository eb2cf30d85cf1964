"""Methods of the comparison: each answers prompts, and every model call is counted."""
