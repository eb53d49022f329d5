"""The commands of ``locallip``: each has ``add(commands)``, its options, and ``run(arguments, command)``, which returns
the exit code."""
