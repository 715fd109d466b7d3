"""Running recipes: from a YAML file and `key=value` arguments to a run folder that can be resumed.

Configuration, the run folder, the stages of longer jobs, and the entry point of every recipe.
"""
