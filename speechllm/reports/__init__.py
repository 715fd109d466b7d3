"""Reports: self-contained HTML pages of results and logs, with plots and sounds."""
