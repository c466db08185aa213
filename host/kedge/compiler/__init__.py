"""The compiler: a trained model becomes a release.

``service`` is the way through; ``dataset`` and ``preprocessing`` read what the user gave, ``tasks`` is what runs in
the worker (``exchange`` its requests and answers), ``ladder`` decides the precision of one target, ``metric`` and
``golden`` measure, ``pack`` and ``report`` write; ``door`` is what users call.
"""
