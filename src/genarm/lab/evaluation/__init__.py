"""Comparisons of methods: recipes, runs, figures and the report."""
