"""Which units of work there are, what they need of each other, and what they cost.

One graph serves both schedules and all executors. Its units for block ``i`` are:

    capture(i, shard) -> router(i, group) -> gather(i, group, experts, shard)
      -> experts(i, group, experts)
    router(i, group) -> weigh(i, group, shard) -> shares(i, group) -> experts(i, group, experts)

``capture`` hands on a sample of its inputs, on which the router is fitted; ``gather`` hands on the
inputs that are routed to some experts, or with many tokens their Hessian sums, which ``reduce``
units add up. ``weigh`` hands on how much the block depends on the outputs of linears that have
others behind them, where that is asked for; ``shares`` are the experts' shares of zeros, where they
have some of their own.

``compressed`` calibration adds ``advance(i, shard)``, the compressed block's output, which the next
block's capture waits for; with ``dense`` calibration the next capture waits for this one alone.
``sequential`` adds ``recapture(i, group, shard)``: a later group's inputs, once the linears before
it inside the block are compressed. ``cumulative`` has the same units, and its captures take the
dense model's own hidden states through the block as well.
"""
