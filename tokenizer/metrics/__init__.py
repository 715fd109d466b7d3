"""Metrics of codes and decoded speech, each with a stated definition.

Speech quality, prosody, usage and content of codes, and voice conversion with its baseline.
"""
