"""What would hold the interpreter's lock for too long, in a process of its own."""
