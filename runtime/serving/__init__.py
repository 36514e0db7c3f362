"""Serve a bundle: Open Inference Protocol v2 over HTTP and gRPC, one batch for all tasks.

    settings    what the operator chose: the one declaration of options and defaults
    server      all of it in one process, started and stopped
    http, grpc  the protocol's two wires; http/page: the third, for people
    errors      what a request can be refused with, and the status that says so
    messages    a request, its response and its deadline, whatever carried them
    tensors     numbers and texts of JSON and protobuf to arrays
    service     a message in, a message out; what HTTP, gRPC and Ray share
    images      encoded pictures to inputs, within limits
    batcher     requests of all tasks to batches of one session
    outputs     logits to what a request asks for
    endpoint    what the wires ask for beside inference: metadata, loading; here or on many replicas
    fleet       adapters by name; fleet/rows: who has a row of the bank; fleet/folders: on disk
    metrics     what Prometheus scrapes; status: what the page shows of one service
    logs        the log lines
    ray         the same on several replicas

Everything but the session's runs, the decoding of images and the reading of adapters happens on
one event loop, so that names, rows and queues need no locks.
"""
