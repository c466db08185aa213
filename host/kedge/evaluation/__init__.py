"""Evaluation: the kind of each output (:mod:`kinds`), its figures and floors (:mod:`outputs`), the metric
(:mod:`metric`, :mod:`metrics`), and confidence intervals (:mod:`intervals`)."""
