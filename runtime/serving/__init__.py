"""Serve a bundle: Open Inference Protocol v2 over HTTP and gRPC, one batch for all tasks.

    errors      what a request can be refused with, and the status that says so
    settings    what the operator chose: addresses, limits, slots
    messages    a request and a response, whatever carried them
    images      encoded pictures to inputs, within limits
    fleet       adapters in rows of the bank: load, replace, evict, remove
    adapter_files  on disk: what the fleet reads and writes
    batcher     requests of all tasks to batches of one session
    service     a message in, a message out; what HTTP, gRPC and Ray share
    outputs     logits to what a request asks for
    metrics     what Prometheus scrapes
    status      what the page shows of one service
    endpoint    what the wires ask for: inference, metadata, loading; here or on many replicas
    http, grpc  the protocol's two wires; page: the third, for people
    server      all of it in one process, started and stopped
    logs        its log lines
    ray_app     the same on several replicas, with its parts: ray_args, ray_replica, ...

Everything but the session's runs, the decoding of images and the reading of adapters happens on
one event loop, so that names, rows and queues need no locks.
"""
