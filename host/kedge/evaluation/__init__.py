"""What is judged, and how: what an output is (:mod:`kinds`), its figures and floors (:mod:`outputs`), the metric
(:mod:`metric`, :mod:`metrics`), error bars (:mod:`intervals`)."""
