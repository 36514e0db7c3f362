"""Clients that mean harm beside honest ones: does the server go on answering these?

    kinds           every kind of abuse by name
    json_bombs ...  one kind or a few in a module: what one connection does, again and again
    wire            how they speak: sockets, a few lines of HTTP
    abuser          one kind from many connections, in a process of the lowest priority
    listener        the control: an address that closes whatever connects to it
    health          the server's health, asked as an orchestrator does, in a process of its own
    children        how these processes are started, and what they found
    run             from a bundle to what was measured, with and without the abuse
    bounds          what of it is allowed

The control costs the machine what the abuser itself costs: what is worse beside the real abuse is
the server's fault.
"""
