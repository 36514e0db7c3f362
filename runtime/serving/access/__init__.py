"""Who may ask a server, and what is encrypted on the way: tokens and TLS, both off by default."""
