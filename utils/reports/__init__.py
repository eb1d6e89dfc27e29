"""The report of utils/report.py: what it reads from runs, its tables and figures, and the HTML page that holds them."""
