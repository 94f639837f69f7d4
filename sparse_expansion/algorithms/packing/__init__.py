"""Compact storage of an expert: which weights are kept, and their values or codes.

Where weights are kept is a bitmask (unstructured) or, for N:M up to M = 16, the index of every
group's pattern among all patterns with as many ones. All bit streams are little-endian: bit ``i``
of a stream is bit ``i % 8`` of byte ``i // 8``. Weights are taken row by row.
``docs/format.md`` is the specification.

``layout`` says which streams an expert has and how long they are, ``streams`` packs masks and
codes, ``patterns`` masks of N:M, and ``experts`` whole experts.
"""
