"""Reports: from results and logs to self-contained HTML pages.

Plots, sounds and styles are inside the page, so that one file can be sent to a colleague.
"""
