"""The report of a compilation: compile.json and report.html."""
