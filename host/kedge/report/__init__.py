"""The report of a compilation: ``report.json`` for programs, ``report.html`` for people."""
