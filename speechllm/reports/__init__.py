"""Pages to look at: results and logs come in, self-contained HTML, plots and sounds go out."""
