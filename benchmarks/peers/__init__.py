"""What people would pick instead, and this, on the same adapters: ``make bench-peers``.

A batch of 8 images in which every image uses another of 8 LoRA adapters that PEFT made; 1, 8 and
64 adapters at hand. ``tasks`` says what is measured, ``prepare`` makes the files of it,
``torches``, ``runtimes`` and ``ours`` are the competitors, ``rounds`` runs them in turn, ``child``
measures memory and changes in processes of their own, ``accuracy`` precisions on real images,
``page`` and ``plots`` make tables and drawings of what was found, which `benchmarks.tables` keeps.
"""
