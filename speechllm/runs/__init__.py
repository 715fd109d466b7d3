"""How a recipe runs: a YAML file and `key=value` words come in, a run folder that can be resumed goes out.

Configuration, the run folder, the stages of longer jobs, and the entry of every recipe.
"""
