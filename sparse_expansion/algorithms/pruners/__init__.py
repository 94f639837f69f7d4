"""One module for every pruner: how it prunes a linear, and what that costs.

A pruner's module holds a ``Pruner`` by the name of ``PRUNER``; its name is also an entry of
``sparse_expansion.pruners.PRUNERS``. ``base`` says what a pruner gets and gives, ``registry`` finds
one by name, and ``scores`` does what pruners by score have in common.
"""
