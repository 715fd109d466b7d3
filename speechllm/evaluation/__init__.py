"""Evaluation: from references and hypotheses to error rates with intervals, and tables that compare systems.

Imports no model and writes no page.
"""
