"""The compiler turns a trained model into a release.

``api`` is :func:`kedge.compile`; ``validation`` checks the request; ``service`` runs the compilation; ``bundle_writer``
and ``release_writer`` write the result. :mod:`kedge.search` finds a candidate for each target, :mod:`kedge.evaluation`
measures it, and :mod:`kedge.report` reports it.
"""
