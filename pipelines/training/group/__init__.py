"""All ranks of a run together: a worker function and the order of rows in, the first rank's result out.

`launch` is the only caller of Ray Train's trainer; change restarts, elasticity and the workers' environment there.
`coordinator` is the run's one actor: it has the batch feed (`feed`: segments, read-ahead) and the run's status, which
`progress` shows in the driver. `watchdog` writes the stacks of a rank whose step hangs.
"""
