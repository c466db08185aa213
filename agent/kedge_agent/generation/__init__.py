"""Text generation: ``engine`` runs a decoder's slots, ``sampling`` picks tokens, ``pieces`` makes text of them,
``chat`` renders messages, ``generator`` is what a :class:`kedge_agent.Model` calls, ``openai`` what HTTP calls."""
