"""Units over Ray actors: the only home of Ray beside ``ray_jobs/``.

The driver holds the plan and references; tensors go from actor to actor through the object store,
weights and results through the store. Actors are never restarted by Ray (a restarted actor would
answer a call that the driver has given up): a lost actor's unit is queued again and a new actor
asked for, which is also what makes an autoscaler act.
"""
