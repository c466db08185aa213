"""The compiler: a trained model becomes a release.

``given`` checks what was asked for, ``service`` is the way through; ``dataset`` reads the user's data,
``tasks`` is what runs in the worker (``exchange`` its requests and answers), :mod:`kedge.search` searches,
``metric`` and ``golden`` measure, ``pack``, ``report`` and ``writing`` write; ``result`` holds what is passed between
them; ``door`` is what users call.
"""
