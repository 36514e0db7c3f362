"""Commands that change bundles for minutes from several processes, and count what went wrong.

    python -m tests.soak.bundle --seconds 120
    python -m tests.soak.fleet --seconds 120
    python -m tests.soak.kills --kills 20

Each ends in one line of JSON and exits with 1 if anything was wrong; `make test` runs them for
some seconds (test_soak.py).
"""
