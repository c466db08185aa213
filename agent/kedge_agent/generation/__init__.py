"""Text generation: ``engine`` runs a decoder's slots, ``sampling`` picks tokens, ``pieces`` decodes them to text,
``chat`` renders messages; :class:`kedge_agent.Model` calls ``generator``, the HTTP server ``openai``."""
