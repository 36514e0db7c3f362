"""Load and fault tests of a running server: every answer is compared with what it must say.

    traffic     which adapter each request asks for, and when
    variants    a fleet of adapters, and further versions of each
    expected    what every version must say, from a bare session; whether an answer says it
    timeline    which versions an adapter may have had while a request was under way
    judge       the verdict on each answer
    client      requests and changes on the wire
    churn       adapters are added, replaced, removed and loaded again meanwhile
    drive       all of it against one server
    scrape      what the server counts itself
    process     the server, in a process of its own
    report      verdicts, latencies and costs
    run         from a bundle to a report

Answers are kept as they came and judged at the end: what they may say depends on when each
change was acknowledged, and the client's CPU time is the server's loss on a shared machine.
"""
