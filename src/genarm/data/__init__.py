"""Preference data: from files and hub data sets to pairs of token ids."""
