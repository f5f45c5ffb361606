"""One policy a module; :func:`copus_ext.core.policy.make_policy` finds them by name."""
