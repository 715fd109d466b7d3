"""Reports: from results and logs to self-contained HTML pages with plots and sounds."""
