"""Ray settings in, an initialised Ray out; also what a job records of its machine and its user's errors.

`session.py` joins or starts a cluster and sets Ray's environment, `exceptions.py` finds user errors inside Ray's
exceptions, `environment.py` describes commit, hardware and library versions.
"""
