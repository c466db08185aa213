"""The plots of a report: plain data, drawn as SVG by the templates."""
