"""`python -m natten.profiler`, also `natten profile`: what a call costs, and its best settings.

========================  =====================================================================
arguments                 the command line, as a checked :class:`~natten.profiler.arguments.Request`
configurations            what every backend accepts, on this device or on one that is not here
subjects                  the calls that are timed: natten's, and those of others to compare with
measuring                 times, operations and memory of a call; what the device can reach
optimize                  the search for the fastest backend and tiles
report                    tables, JSON and CSV
run                       all of them together
========================  =====================================================================
"""
