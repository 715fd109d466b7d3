"""How good texts and systems are: references and hypotheses come in, rates with intervals and tables go out.

Knows no model and draws no page.
"""
